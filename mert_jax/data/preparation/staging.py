"""Decodes files to int16 samples in OUTPUT/.staging, and keeps a journal of those that are done.

A file of samples is named by the hash of its content, once it is complete.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable

from mert_jax.constants import FULL_SCALE, SAMPLE_RATE
from mert_jax.data.decoding import SkippedFile, decode, to_int16
from mert_jax.data.preparation.sources import Outcome, SourceFile, read_lines

SILENCE_PEAK = 3  # -80 dBFS; a track that nowhere reaches it is silent, perhaps dithered
# reasons that may no longer hold at the next run, although the file is the same
TRANSIENT_REASONS = frozenset({"unreadable", "decoder died"})
_REPORT_SECONDS = 0.5


def audio_path(staging: str, track: str) -> str:
    """Return the path of the samples of a decoded track."""
    return os.path.join(staging, "audio", track + ".s16le")


def journal_path(staging: str) -> str:
    """Return the path of the journal of decoded files."""
    return os.path.join(staging, "journal.jsonl")


def stage(source: SourceFile, report: Callable[[tuple[int, float]], None], staging: str) -> Outcome:
    """Decode a file into the staging directory, reporting (samples, fraction done) meanwhile.

    Raises OSError if the staging directory cannot be written.
    """
    partial = os.path.join(staging, "partial", f"{os.getpid()}.s16le")
    try:
        return _stage(source, staging, partial, report)
    except SkippedFile as e:
        return Outcome(reason=e.reason, detail=e.detail)
    except OSError:
        raise  # of the staging directory: errors of the source are SkippedFile
    except Exception as e:  # a decoder may raise anything on a broken file: skip that file only
        return Outcome(reason="decoder failed", detail=f"{type(e).__name__}: {e}")
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


def _stage(
    source: SourceFile, staging: str, partial: str, report: Callable[[tuple[int, float]], None]
) -> Outcome:
    digest = hashlib.blake2b(digest_size=8)
    samples = clipped = peak = 0
    reported = time.monotonic()
    with decode(source.path) as (header, blocks), open(partial, "wb") as file:
        expected = (header.frames or 0) / header.sample_rate * SAMPLE_RATE
        for block in blocks:
            audio, over = to_int16(block)
            data = audio.tobytes()
            digest.update(data)
            file.write(data)
            samples += len(audio)
            clipped += over
            if len(audio):
                peak = max(peak, -int(audio.min()), int(audio.max()))
            if time.monotonic() - reported > _REPORT_SECONDS:
                report((samples, min(1.0, samples / expected) if expected else 0.0))
                reported = time.monotonic()
    if not samples:
        raise SkippedFile("empty", "0 samples at 24 kHz")
    if peak < SILENCE_PEAK:
        raise SkippedFile("silent", f"peak {peak} of {FULL_SCALE} in {samples / SAMPLE_RATE:.1f} s")
    track = digest.hexdigest()
    os.replace(partial, audio_path(staging, track))
    return Outcome(track, samples, clipped, header.sample_rate, header.channels, header.format)


def staged(staging: str) -> dict[str, tuple[SourceFile, Outcome]]:
    """Return the outcomes of an interrupted run by path, if the samples are still complete."""
    outcomes = {}
    for source, outcome in read_lines(journal_path(staging)):
        path = audio_path(staging, outcome.track)
        complete = os.path.exists(path) and os.path.getsize(path) == 2 * outcome.samples
        if outcome.reason or complete:
            outcomes[source.path] = (source, outcome)
    return outcomes
