"""One source file decoded to a file of int16 samples, and the journal of those already done.

Everything here lies under OUTPUT/.staging until the dataset is assembled from it. A file of samples
is named by the hash of its content and gets that name only when it is complete.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable

from mert_jax.constants import SAMPLE_RATE
from mert_jax.data.decoding import SkippedFile, decode, to_int16
from mert_jax.data.preparation.sources import Outcome, SourceFile, read_lines

# Quieter than this everywhere (-80 dBFS), a track is silence, dithered perhaps.
SILENCE_PEAK = 3
# Reasons that may not hold at the next run, though the file is the same.
TRANSIENT_REASONS = frozenset({"unreadable", "decoder died"})
_REPORT_SECONDS = 0.5


def audio_path(staging: str, track: str) -> str:
    """Where the samples of a decoded track wait for assembly."""
    return os.path.join(staging, "audio", track + ".s16le")


def journal_path(staging: str) -> str:
    """The file that names what was decoded so far."""
    return os.path.join(staging, "journal.jsonl")


def stage(source: SourceFile, report: Callable[[tuple[int, float]], None], staging: str) -> Outcome:
    """Decode a file into the staging directory; `report` gets (samples, fraction done) meanwhile.

    Raises OSError where the staging directory cannot be written.
    """
    partial = os.path.join(staging, "partial", f"{os.getpid()}.s16le")
    try:
        return _stage(source, staging, partial, report)
    except SkippedFile as e:
        return Outcome(reason=e.reason, detail=e.detail)
    except OSError:
        raise  # the staging directory, not the source: reading errors come as LeftOut
    except Exception as e:  # whatever a decoder makes of a broken file, it costs that file only
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
        raise SkippedFile("silent", f"peak {peak} of 32768 in {samples / SAMPLE_RATE:.1f} s")
    track = digest.hexdigest()
    os.replace(partial, audio_path(staging, track))
    return Outcome(track, samples, clipped, header.sample_rate, header.channels, header.format)


def staged(staging: str) -> dict[str, tuple[SourceFile, Outcome]]:
    """Outcomes by path of the files an interrupted run had done, their samples still complete."""
    found = {}
    for source, outcome in read_lines(journal_path(staging)):
        if outcome.reason or _size(audio_path(staging, outcome.track)) == 2 * outcome.samples:
            found[source.path] = (source, outcome)
    return found


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return -1
