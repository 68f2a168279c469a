"""Prepares a dataset from audio files, resumes an interrupted preparation, or updates a dataset."""

import contextlib
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Container, Iterator, Sequence
from typing import Any

import numpy as np

from mert_jax import progress
from mert_jax.constants import SAMPLE_RATE
from mert_jax.data import code_checks, records
from mert_jax.data.preparation import assemble, selection, sources
from mert_jax.data.preparation.selection import REPORT, PreparationSettings
from mert_jax.data.preparation.sources import Outcome, SourceFile
from mert_jax.data.preparation.workers import run_jobs
from mert_jax.errors import UserError
from mert_jax.files import atomic_write, directory_lock

_SOURCES = "sources.jsonl"  # outcomes of all files: a later run decodes new and changed files only
# reasons that may no longer hold at the next run, although the file is the same
TRANSIENT_REASONS = frozenset({"unreadable", "decoder died"})


def prepare(
    inputs: Sequence[str], output: str, settings: PreparationSettings, workers: int
) -> dict[str, Any]:
    """Prepare or complete the dataset in `output` and return its report.

    Raises UserError for inputs without audio, and an `output` of other settings or not writable.
    """
    source_list = sources.find_sources(inputs, exclude=output)
    with _exclusive(output, "decoded files"):
        return _prepare(source_list, output, settings, workers)


@contextlib.contextmanager
def _exclusive(output: str, finished: str) -> Iterator[None]:
    """Lock `output`; if it cannot be written, say that `finished` are kept."""
    try:
        with directory_lock(output):
            yield
    except OSError as e:
        raise UserError(
            f"cannot write {output}: {e.strerror or e}; free some space or give another --output, "
            f"then run the command again ({finished} are kept)"
        ) from e


def _prepare(
    source_list: sources.SourceList, output: str, settings: PreparationSettings, workers: int
) -> dict[str, Any]:
    stage_dir = os.path.join(output, ".staging")
    assemble.switch(output, stage_dir)
    stored = assemble.stored_tracks(output)
    before = records.metadata(output)["settings"] if stored else settings._asdict()
    for name, value in settings._asdict().items():
        if (old := before.get(name)) != value:
            raise UserError(
                f"{output} was prepared with {name}={old}, now {name}={value}; keep the old value, "
                f"give another --output, or remove {output}"
            )
    outcomes = _known_outcomes(source_list.sources, output, stored, settings.min_seconds)
    if todo := [source for source in source_list.sources if source.path not in outcomes]:
        progress.note(f"{len(todo)} audio files to decode (--workers={workers})")
        outcomes |= _decode(todo, stage_dir, workers)
    files = [(source, outcomes[source.path]) for source in source_list.sources]
    tracks, decoded, left_out = selection.select(files, settings.min_seconds)
    splits = assemble.split_tracks(tracks, settings.validation_fraction)
    metadata = selection.describe(splits, settings)
    report = selection.make_report(decoded, left_out + source_list.left_out, metadata)
    new = {t._replace(split=split) for split, tracks in splits.items() for t in tracks}
    changed = bool(new) and new != {t._replace(first=0) for t in stored.values()}
    directory = assemble.build(splits, output, stage_dir, metadata) if changed else output
    _write(os.path.join(directory, REPORT), json.dumps(report, indent=1) + "\n")
    if not new:
        raise UserError(
            f"no usable audio in {report['files']} files: {selection.count_reasons(report)}; "
            f"see {os.path.join(output, REPORT)}"
        )
    lines = (sources.to_line(source, outcome) for source, outcome in files)
    _write(os.path.join(directory, _SOURCES), "".join(lines))
    if changed:
        assemble.finish(directory, stage_dir)
        assemble.switch(output, stage_dir)
    else:
        progress.note(f"{output} is complete: nothing to add or remove")
        shutil.rmtree(stage_dir, ignore_errors=True)
    return report


def _known_outcomes(
    files: Sequence[SourceFile], output: str, stored: Container[str], min_seconds: float
) -> dict[str, Outcome]:
    """Return what earlier runs recorded of unchanged files, if decoding would only repeat it."""
    stage_dir, outcomes = os.path.join(output, ".staging"), {}
    states = {source.path: source[2:] for source in files}

    def is_final(outcome: Outcome) -> bool:
        if outcome.reason == "needs ffmpeg":
            return not shutil.which("ffmpeg")
        short = outcome.samples < min_seconds * SAMPLE_RATE
        if outcome.reason or short or outcome.track in stored:
            return outcome.reason not in TRANSIENT_REASONS
        path = sources.audio_path(stage_dir, outcome.track)
        return os.path.exists(path) and os.path.getsize(path) == 2 * outcome.samples

    for journal in (os.path.join(output, _SOURCES), os.path.join(stage_dir, sources.JOURNAL)):
        for source, outcome in sources.read_lines(journal):
            if states.get(source.path) == source[2:] and is_final(outcome):
                outcomes[source.path] = outcome
    return outcomes


def _decode(todo: Sequence[SourceFile], stage_dir: str, workers: int) -> dict[str, Outcome]:
    """Decode files in processes, the largest first, and append each outcome to the journal."""
    for name in ("partial", "audio"):
        os.makedirs(os.path.join(stage_dir, name), exist_ok=True)
    outcomes, stage = {}, functools.partial(sources.stage, staging=stage_dir)
    jobs = sorted(todo, key=lambda source: (-source.size, source.path))
    with (
        progress.bar("decoding", sum(source.size for source in todo), "B") as bar,
        open(os.path.join(stage_dir, sources.JOURNAL), "a", buffering=1) as journal,
    ):
        # a run killed while writing leaves half a line; the next line must not join it
        journal.write("\n")
        for source, result, cause in run_jobs(stage, jobs, workers):
            outcome = result or Outcome(reason="decoder died", detail=cause)
            journal.write(sources.to_line(source, outcome))
            outcomes[source.path] = outcome
            bar.set_postfix_str(f"{len(outcomes)} of {len(todo)} files", refresh=False)
            bar.update(source.size)
    return outcomes


def _write(path: str, text: str) -> None:
    with atomic_write(path, replace=True) as temporary:
        pathlib.Path(temporary).write_text(text)


def store_codes(output: str, checkpoint: str) -> None:
    """Store the codes of every track of the dataset in `output` and print how often each is used.

    Raises UserError for an unreadable checkpoint, a full disk, and a degenerate codebook.
    """
    from mert_jax.data.preparation import encode  # loads jax, which decoding does not need

    records.metadata(output)
    # the bar's rate is the real-time factor
    with _exclusive(output, "encoded tracks"), progress.bar("encoding", 0, "s") as bar:
        info = encode.encode(output, checkpoint, bar)
    for split, counts in info.counts.items():
        frames = sum(counts[0])
        line = code_checks.check_codes(f"codes of {split}", np.array(counts), frames)
        print(f"  {line} of {frames} frames")
