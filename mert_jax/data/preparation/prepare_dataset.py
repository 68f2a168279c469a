"""Prepares a dataset from audio files, resumes an interrupted preparation, or updates a dataset.

OUTPUT/sources.jsonl records the outcome of every file, so that a later run decodes only new and
changed files.
"""

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mert_jax import progress
from mert_jax.constants import SAMPLE_RATE
from mert_jax.data import code_checks, records
from mert_jax.data.preparation import assemble, sources, staging
from mert_jax.data.preparation.selection import (
    REPORT,
    PreparationSettings,
    count_reasons,
    describe,
    make_report,
    select,
)
from mert_jax.data.preparation.sources import Outcome, SourceFile
from mert_jax.data.preparation.workers import run_jobs
from mert_jax.errors import UserError
from mert_jax.files import atomic_write, directory_lock

_SOURCES = "sources.jsonl"
Outcomes = dict[str, tuple[SourceFile, Outcome]]  # by path


def prepare(
    inputs: Sequence[str], output: str, settings: PreparationSettings, workers: int
) -> dict[str, Any]:
    """Prepare or complete the dataset in `output` and return its report.

    Raises UserError for inputs without usable audio, another dataset or other settings in
    `output`, and a disk that cannot be written.
    """
    if settings.chunk_samples <= settings.overlap_samples or settings.overlap_samples <= 0:
        raise UserError(
            f"--chunk_seconds={settings.chunk_seconds:g} must be longer than "
            f"--crop_seconds={settings.crop_seconds:g}, and that longer than 0"
        )
    if "://" in output:
        raise UserError(
            f"--output={output}: shards are written to a local disk only; prepare there and copy "
            "the directory"
        )
    source_list = sources.find_sources(inputs, exclude=output)
    with _full_disk_named(output, "decoded files"), directory_lock(output):
        return _prepare(source_list, output, settings, workers)


@contextlib.contextmanager
def _full_disk_named(path: str, finished: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise UserError(
            f"cannot write {path}: {e.strerror or e}; free some space or give another --output, "
            f"then run the command again ({finished} are kept)"
        ) from e


def _prepare(
    source_list: sources.SourceList, output: str, settings: PreparationSettings, workers: int
) -> dict[str, Any]:
    stage_dir = os.path.join(output, ".staging")
    assemble.switch(output, stage_dir)
    _check_settings(output, settings)
    stored = assemble.stored_tracks(output)
    outcomes = _known_outcomes(output, stage_dir, stored, settings.min_seconds)
    todo = [source for source in source_list.sources if not _is_known(source, outcomes)]
    if todo:
        progress.note(
            f"{len(source_list.sources)} audio files, {len(todo)} to decode (--workers={workers})"
        )
    outcomes |= _decode(todo, stage_dir, workers)
    files = [(source, outcomes[source.path][1]) for source in source_list.sources]
    selection = select(files, settings.min_seconds)
    splits = assemble.split_tracks(selection.tracks, settings.validation_fraction)
    metadata = describe(splits, settings)
    report = make_report(selection, source_list.left_out, metadata)
    if not selection.tracks:
        _write_report(output, report)
        raise UserError(
            f"no usable audio in {report['files']} files: {count_reasons(report)}; "
            f"see {os.path.join(output, REPORT)}"
        )
    new = {(t.track, t.path, t.samples, split) for split in splits for t in splits[split]}
    old = {(track, s.path, s.samples, s.split) for track, s in stored.items()}
    directory = _build(splits, output, stage_dir, metadata) if new != old else output
    _write_report(directory, report)
    lines = (sources.to_line(source, outcome) for source, outcome in files)
    _write_text(os.path.join(directory, _SOURCES), "".join(lines))
    if new != old:
        assemble.finish(directory, stage_dir)
        assemble.switch(output, stage_dir)
    else:
        progress.note(f"{output} is complete: nothing to add or remove")
        shutil.rmtree(stage_dir, ignore_errors=True)
    return report


def _check_settings(output: str, settings: PreparationSettings) -> None:
    if not os.path.exists(os.path.join(output, records.INFO)):
        return
    before = records.metadata(output)["settings"]
    for name, value in settings._asdict().items():
        if before.get(name) != value:
            raise UserError(
                f"{output} was prepared with {name}={before.get(name)}, now {name}={value}; keep "
                f"--{name}={before.get(name)}, give another --output, or remove {output}"
            )


def _known_outcomes(
    output: str, stage_dir: str, stored: dict[str, assemble.Stored], min_seconds: float
) -> Outcomes:
    """Return the outcomes that earlier runs recorded and whose samples still exist."""
    outcomes = {}
    if stored:
        for source, outcome in sources.read_lines(os.path.join(output, _SOURCES)):
            short = outcome.samples < min_seconds * SAMPLE_RATE
            if outcome.reason or short or outcome.track in stored:
                outcomes[source.path] = (source, outcome)
    return outcomes | staging.staged(stage_dir)


def _is_known(source: SourceFile, outcomes: Outcomes) -> bool:
    """Return whether a file is unchanged and decoding it again would give the same outcome."""
    if source.path not in outcomes:
        return False
    before, outcome = outcomes[source.path]
    unchanged = (before.size, before.mtime_ns) == (source.size, source.mtime_ns)
    transient = outcome.reason in staging.TRANSIENT_REASONS
    ffmpeg_installed = outcome.reason == "needs ffmpeg" and shutil.which("ffmpeg")
    return bool(unchanged and not transient and not ffmpeg_installed)


def _decode(todo: Sequence[SourceFile], stage_dir: str, workers: int) -> Outcomes:
    """Decode files in processes, the largest first, and append each outcome to the journal."""
    if not todo:
        return {}
    shutil.rmtree(os.path.join(stage_dir, "partial"), ignore_errors=True)
    os.makedirs(os.path.join(stage_dir, "partial"))
    os.makedirs(os.path.join(stage_dir, "audio"), exist_ok=True)
    outcomes = {}
    running: dict[str, tuple[int, float]] = {}  # samples and bytes so far, by path
    samples = size = 0
    jobs = sorted(todo, key=lambda source: (-source.size, source.path))
    function = functools.partial(staging.stage, staging=stage_dir)
    with (
        progress.bar("decoding", sum(source.size for source in todo), "B") as bar,
        open(staging.journal_path(stage_dir), "a", buffering=1) as journal,
    ):
        # a run killed while writing leaves half a line; the next line must not join it
        journal.write("\n")
        for source, kind, value in run_jobs(function, jobs, workers):
            if kind == "progress":
                running[source.path] = (value[0], value[1] * source.size)
            else:
                died = Outcome(reason="decoder died", detail=str(value))
                outcome = value if kind == "result" else died
                journal.write(sources.to_line(source, outcome))
                outcomes[source.path] = (source, outcome)
                running.pop(source.path, None)
                samples += outcome.samples
                size += source.size
            hours = (samples + sum(n for n, _ in running.values())) / SAMPLE_RATE / 3600
            bar.set_postfix_str(f"{len(outcomes)}/{len(todo)} files, {hours:.2f} h", refresh=False)
            bar.update(size + sum(int(n) for _, n in running.values()) - bar.n)
    return outcomes


def _build(
    splits: dict[str, list[assemble.Track]],
    output: str,
    stage_dir: str,
    metadata: dict[str, Any],
) -> str:
    chunk, overlap = metadata["chunk_samples"], metadata["overlap_samples"]
    lengths = [track.samples for tracks in splits.values() for track in tracks]
    spans = [span for length in lengths for span in records.chunk_spans(length, chunk, overlap)]
    size = 2 * sum(stop - start for start, stop in spans)
    needed, free = size * 1.01, shutil.disk_usage(output).free  # 1 % for headers and metadata
    if needed > free:
        raise UserError(
            f"{output} has {free / 1e9:.2f} GB free and {needed / 1e9:.2f} GB more are needed to "
            "write the dataset; free some space and run again (decoded files are kept)"
        )
    with progress.bar("writing", size, "B") as bar:
        return assemble.build(splits, output, stage_dir, metadata, bar.update)


def _write_text(path: str, text: str) -> None:
    with atomic_write(path, replace=True) as temporary, open(temporary, "w") as file:
        file.write(text)


def _write_report(directory: str, report: dict[str, Any]) -> None:
    _write_text(os.path.join(directory, REPORT), json.dumps(report, indent=1) + "\n")


def store_codes(output: str, checkpoint: str) -> None:
    """Store the codes of every track of the dataset in `output` and print how often each is used.

    Raises UserError for an unreadable checkpoint, a disk that cannot be written, and a degenerate
    codebook, whose codes stay but are refused by training too.
    """
    from mert_jax.data.preparation import encode  # loads jax, which decoding does not need

    records.metadata(output)
    named = _full_disk_named(os.path.join(output, "codes"), "encoded tracks")
    # the bar's rate is the real-time factor
    with named, directory_lock(output), progress.bar("encoding", 0, "s") as bar:
        info = encode.encode(output, checkpoint, bar)
    for split, counts in info.counts.items():
        frames = sum(counts[0])
        line = code_checks.check_codes(f"codes of {split}", np.array(counts), frames)
        print(f"  {line} of {frames} frames")
