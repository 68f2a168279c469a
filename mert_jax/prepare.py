"""Decode music once: any audio files -> a TFDS dataset of mono 24 kHz int16 chunks.

    python -m mert_jax.prepare --input=MUSIC --output=DIR

MUSIC is a directory, searched through, or audio files: wav, flac, ogg, opus, mp3, and what ffmpeg
reads where that is installed. `tfds.builder_from_directory(DIR).as_data_source("train")` reads DIR;
DIR/report.json says what came in and what was left out, and why.

    python -m mert_jax.prepare --output=DIR --codes=CHECKPOINT

stores the codes of whole tracks by an RVQ-VAE (an EnCodec, or one of `fit_teacher`) beside the
audio; `train` uses them where they are. With --input too, both are done.

May be stopped at any time and run again. Run later, it adds the files that came since, whose music
alone is decoded (the rest is copied from the old shards), and drops tracks whose files went. While
it runs it needs room for about twice the dataset, 0.2 GB an hour of music.

Measured, hours of music a minute on one core (`python -m tests.benchmarks.prepare FILES`): Vorbis
6.5, Opus 3.1, FLAC 9.2; 44 MiB of memory a process, where librosa.load takes 1.15 to 1.4 times as
long and memory that grows with the file.
"""

import functools
import json
import os
import shutil
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags

from mert_jax import cli, progress
from mert_jax import files as atomic
from mert_jax.constants import SAMPLE_RATE
from mert_jax.data import records
from mert_jax.data.preparation import assemble, sources, staging
from mert_jax.data.preparation.selection import PreparationSettings, describe, select
from mert_jax.data.preparation.sources import Outcome, SourceFile
from mert_jax.data.preparation.summary import REPORT, make_report, print_summary
from mert_jax.data.preparation.workers import cpus, run_jobs
from mert_jax.errors import UserError

FLAGS = flags.FlagValues()

_INPUT = flags.DEFINE_multi_string(
    "input",
    None,
    "Directories and audio files; repeat the flag or separate them by commas.",
    flag_values=FLAGS,
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory of the dataset.", flag_values=FLAGS)
_CHUNK_SECONDS = flags.DEFINE_float(
    "chunk_seconds", 30.0, "Length of a record.", lower_bound=0, flag_values=FLAGS
)
_CROP_SECONDS = flags.DEFINE_float(
    "crop_seconds",
    5.12,
    "Longest crop training draws; neighbouring records share it.",
    0,
    flag_values=FLAGS,
)
_MIN_SECONDS = flags.DEFINE_float(
    "min_seconds", 1.0, "Leave out shorter files.", lower_bound=0, flag_values=FLAGS
)
_VALIDATION_FRACTION = flags.DEFINE_float(
    "validation_fraction",
    0.05,
    "Part of the tracks held out of training; 0 for none.",
    0,
    0.5,
    flag_values=FLAGS,
)
_WORKERS = flags.DEFINE_integer(
    "workers",
    None,
    "Decoding processes (default: one for each CPU).",
    lower_bound=1,
    flag_values=FLAGS,
)
_CODES = flags.DEFINE_string(
    "codes",
    None,
    "Checkpoint of an RVQ-VAE, whose codes of the tracks to store beside the audio.",
    flag_values=FLAGS,
)

_SOURCES = "sources.jsonl"


def prepare(
    inputs: Sequence[str], output: str, settings: PreparationSettings, workers: int
) -> dict[str, Any]:
    """Make or complete the dataset in `output` and return its report.

    Raises `UserError` for inputs without usable audio, another dataset or other settings in
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
    found = sources.find_sources(inputs, exclude=output)
    try:
        with atomic.directory_lock(output):
            return _prepare(found, output, settings, workers)
    except OSError as e:
        raise UserError(
            f"cannot write {output}: {e.strerror or e}; free it or give another --output, then run "
            "the command again (what is decoded is kept)"
        ) from e


def _prepare(
    found: sources.SourceList, output: str, settings: PreparationSettings, workers: int
) -> dict[str, Any]:
    stage_dir = os.path.join(output, ".staging")
    assemble.switch(output, stage_dir)
    _check_settings(output, settings)
    stored = assemble.stored_tracks(output)
    known = _known(output, stage_dir, stored, settings.min_seconds)
    todo = [s for s in found.sources if not _is_known(s, known)]
    if todo:
        progress.note(
            f"{len(found.sources)} audio files, {len(todo)} to decode (--workers={workers})"
        )
    known |= _decode(todo, stage_dir, known, workers)
    files = [(s, known[s.path][1]) for s in found.sources]
    selection = select(files, settings.min_seconds)
    splits = assemble.split_tracks(selection.tracks, settings.validation_fraction)
    metadata = describe(splits, settings)
    report = make_report(selection, found.left_out, metadata)
    if not selection.tracks:
        _write_text(os.path.join(output, REPORT), json.dumps(report, indent=1) + "\n")
        counts = ", ".join(f"{n} {reason}" for reason, n in report["left_out_counts"].items())
        raise UserError(
            f"no usable audio in {report['files']} files: {counts}; "
            f"{os.path.join(output, REPORT)} names them"
        )
    new = {(t.track, t.path, t.samples, name) for name, held in splits.items() for t in held}
    if new != {(track, s.path, s.samples, s.split) for track, s in stored.items()}:
        building = _build(splits, output, stage_dir, metadata)
        _write_reports(building, files, report)
        assemble.finish(building, stage_dir)
        assemble.switch(output, stage_dir)
    else:
        progress.note(f"{output} is complete: nothing to add or remove")
        _write_reports(output, files, report)
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


def _known(
    output: str, stage_dir: str, stored: dict[str, assemble.Stored], min_seconds: float
) -> dict[str, tuple[SourceFile, Outcome]]:
    """Outcomes by path of files that need no decoding, if they have not changed."""
    known = {}
    if stored:
        for source, outcome in sources.read_lines(os.path.join(output, _SOURCES)):
            short = outcome.samples < min_seconds * SAMPLE_RATE
            if outcome.reason or short or outcome.track in stored:
                known[source.path] = (source, outcome)
    known |= staging.staged(stage_dir)
    return known


def _is_known(source: SourceFile, known: dict[str, tuple[SourceFile, Outcome]]) -> bool:
    if source.path not in known:
        return False
    before, outcome = known[source.path]
    unchanged = (before.size, before.mtime_ns) == (source.size, source.mtime_ns)
    passing = outcome.reason in staging.TRANSIENT_REASONS
    ffmpeg_came = outcome.reason == "needs ffmpeg" and shutil.which("ffmpeg")
    return bool(unchanged and not passing and not ffmpeg_came)


def _decode(
    todo: Sequence[SourceFile],
    stage_dir: str,
    known: dict[str, tuple[SourceFile, Outcome]],
    workers: int,
) -> dict[str, tuple[SourceFile, Outcome]]:
    """Decode files in processes, largest first, noting each in the journal when it is done."""
    if not todo:
        return {}
    shutil.rmtree(os.path.join(stage_dir, "partial"), ignore_errors=True)
    os.makedirs(os.path.join(stage_dir, "partial"))
    os.makedirs(os.path.join(stage_dir, "audio"), exist_ok=True)
    done = {}
    doing: dict[str, tuple[int, float]] = {}  # samples and fraction so far, by path
    samples = size = 0
    jobs = sorted(todo, key=lambda source: (-source.size, source.path))
    function = functools.partial(staging.stage, staging=stage_dir)
    with (
        progress.bar("decoding", sum(source.size for source in todo), "B") as bar,
        open(staging.journal_path(stage_dir), "a", buffering=1) as journal,
    ):
        # a run killed while writing leaves half a line; what follows must not join it
        journal.write("\n")
        for source, kind, value in run_jobs(function, jobs, workers):
            if kind == "progress":
                doing[source.path] = (value[0], value[1] * source.size)
            else:
                died = Outcome(reason="decoder died", detail=str(value))
                outcome = value if kind == "result" else died
                journal.write(sources.to_line(source, outcome))
                done[source.path] = (source, outcome)
                doing.pop(source.path, None)
                samples += outcome.samples
                size += source.size
            hours = (samples + sum(s for s, _ in doing.values())) / SAMPLE_RATE / 3600
            bar.set_postfix_str(f"{len(done)}/{len(todo)} files, {hours:.2f} h", refresh=False)
            bar.update(size + sum(int(b) for _, b in doing.values()) - bar.n)
    return done


def _build(
    splits: dict[str, list[assemble.Track]],
    output: str,
    stage_dir: str,
    metadata: dict[str, Any],
) -> str:
    chunk, overlap = metadata["chunk_samples"], metadata["overlap_samples"]
    tracks = [t for held in splits.values() for t in held]
    spans = [span for t in tracks for span in records.chunk_spans(t.samples, chunk, overlap)]
    samples = sum(stop - start for start, stop in spans)
    needed, free = 2 * samples * 1.01, shutil.disk_usage(output).free
    if needed > free:
        raise UserError(
            f"{output} has {free / 1e9:.2f} GB free and {needed / 1e9:.2f} GB more are needed to "
            "write the dataset; free some and run again: what is decoded is kept"
        )
    with progress.bar("writing", 2 * samples, "B") as bar:
        return assemble.build(
            splits, output, stage_dir, metadata, assemble.SHARD_BYTES, lambda n: bar.update(2 * n)
        )


def _write_reports(
    directory: str, files: Sequence[tuple[SourceFile, Outcome]], report: dict[str, Any]
) -> None:
    lines = "".join(sources.to_line(source, outcome) for source, outcome in files)
    _write_text(os.path.join(directory, _SOURCES), lines)
    _write_text(os.path.join(directory, REPORT), json.dumps(report, indent=1) + "\n")


def _write_text(path: str, text: str) -> None:
    with open(path + ".partial", "w") as file:
        file.write(text)
    os.replace(path + ".partial", path)


def store_codes(output: str, checkpoint: str) -> None:
    """Store the codes of every track of the dataset in `output`, and say how they are used.

    Raises `UserError` as `encode.encode` does, for a degenerate codebook (the codes stay, training
    would refuse them too), and for a disk that cannot be written.
    """
    from mert_jax.data import code_checks
    from mert_jax.data.preparation import encode  # jax, which decoding has no need of

    records.metadata(output)
    try:
        # the bar's rate is the real-time factor
        with atomic.directory_lock(output), progress.bar("encoding", 0, "s") as bar:
            made = encode.encode(output, checkpoint, bar)
    except OSError as e:
        raise UserError(
            f"cannot write {output}/codes: {e.strerror or e}; free it and run the command again "
            "(the tracks that are encoded are kept)"
        ) from e
    for split, counts in made.counts.items():
        frames = sum(counts[0])
        line = code_checks.check_codes(f"codes of {split}", np.array(counts), frames)
        print(f"  {line} of {frames} frames")


def main() -> int:
    """Run the command and return its exit code."""
    inputs = cli.paths(_INPUT.value or [])
    if not _OUTPUT.value or not (inputs or _CODES.value):
        raise UserError(
            "--input and --output are needed: --input=DIR_OR_FILES --output=DIR; or --output and "
            "--codes=CHECKPOINT, to store codes beside a dataset that is there"
        )
    settings = PreparationSettings(
        chunk_seconds=_CHUNK_SECONDS.value,
        crop_seconds=_CROP_SECONDS.value,
        min_seconds=_MIN_SECONDS.value,
        validation_fraction=_VALIDATION_FRACTION.value,
    )
    started = time.monotonic()
    try:
        if inputs:
            report = prepare(inputs, _OUTPUT.value, settings, _WORKERS.value or cpus())
            print_summary(report, _OUTPUT.value)
        if _CODES.value:
            store_codes(_OUTPUT.value, _CODES.value)
    except KeyboardInterrupt:
        progress.note("stopped; what is done is kept: run the same command again to go on")
        return 130
    progress.note(f"done in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    cli.run(main, FLAGS)
