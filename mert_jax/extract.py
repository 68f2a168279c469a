"""Hidden states of music, a file each, by any checkpoint.

    python -m mert_jax.extract --checkpoint=PATH --input=MUSIC --output=DIR

PATH is a workdir of ours, a Hugging Face MERT directory or a fairseq .pt; MUSIC a folder, searched
through, or audio files of any format, rate and length. DIR/NAME.npz of NAME.mp3 has `hidden_states`
[layers, T, D], `layers` (0 is the encoder's input, l the output of layer l), `times` (seconds, the
middle of each frame) and `frame_rate`. With --pool=mean it has means over time [layers, D], which
DIR/features.parquet has of all files too.

May be stopped and run again: what is done stays. A file that cannot be used is named, the rest goes
on, and the exit code is 1; DIR/report.json has the list.
"""

import collections
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from mert_jax import cli, files, progress
from mert_jax.data.decoding import SkippedFile
from mert_jax.data.preparation import sources
from mert_jax.data.preparation.sources import SourceFile
from mert_jax.errors import UserError
from mert_jax.extraction import embedder as embedding
from mert_jax.extraction import table
from mert_jax.extraction.embedder import EmbeddingSettings
from mert_jax.extraction.run import ExtractionRun
from mert_jax.files import JsonlFile, read_jsonl

FLAGS = flags.FlagValues()
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "Workdir, Hugging Face directory or fairseq file.",
    required=True,
    flag_values=FLAGS,
)
_INPUT = flags.DEFINE_multi_string(
    "input",
    None,
    "Directories and audio files; repeat it or use commas.",
    required=True,
    flag_values=FLAGS,
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Directory of the results.", required=True, flag_values=FLAGS
)
_LAYERS = flags.DEFINE_string(
    "layers",
    "all",
    "Which hidden states: all, 7 or 0,7,12; 0 is the encoder's input.",
    flag_values=FLAGS,
)
_POOL = flags.DEFINE_enum(
    "pool", "none", ["none", "mean"], "Mean over time, or every frame.", flag_values=FLAGS
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "float16"], "Of what is written.", flag_values=FLAGS
)
_CHUNK_SECONDS = flags.DEFINE_float(
    "chunk_seconds",
    60.0,
    "Longer files are embedded in overlapping chunks of as many.",
    1,
    flag_values=FLAGS,
)
_CONTEXT_SECONDS = flags.DEFINE_float(
    "context_seconds",
    2.0,
    "What each frame of a chunk hears on both sides, at least.",
    0,
    flag_values=FLAGS,
)
_WINDOW_SECONDS = flags.DEFINE_float(
    "window_seconds",
    0.0,
    "Embed clips of so many as if each were a file; 0: do not.",
    0,
    flag_values=FLAGS,
)
_BATCH_SECONDS = flags.DEFINE_float(
    "batch_seconds", 60.0, "Audio on a device at a time; more may be faster.", 1, flag_values=FLAGS
)

SETTINGS, FILES, REPORT, TABLE = "settings.json", "files.jsonl", "report.json", "features.parquet"

NOT_AUDIO = "not audio"  # reason of `sources.find` for what its name says of it
SHOWN = 20  # files that failed, on the console


def extract(
    checkpoint: str, inputs: Sequence[str], output: str, settings: EmbeddingSettings, dtype: str
) -> dict[str, Any]:
    """Embed the audio files of `inputs` and return the report.

    Raises UserError for a checkpoint that cannot be read, for inputs without usable audio, for an
    `output` made with other settings, and for a disk that does not take it.
    """
    found = sources.find_sources(inputs, exclude=output)
    if not found.sources:
        raise UserError(f"no audio in the {len(found.left_out)} files of {','.join(inputs)}")
    model = embedding.load(checkpoint)
    try:
        with files.directory_lock(output):
            return _extract(model, found, output, settings, np.dtype(dtype))
    except OSError as e:
        raise UserError(
            f"cannot write {output}: {e.strerror or e}; free it or give another --output, then run "
            "the command again (what is done is kept)"
        ) from e


def _extract(
    model: embedding.Model,
    found: sources.SourceList,
    output: str,
    settings: EmbeddingSettings,
    dtype: np.dtype,
) -> dict[str, Any]:
    embedder = embedding.Embedder(model, settings)
    said = {"model": model.fingerprint, "dtype": dtype.name, **settings._asdict()}
    said |= {"layers": list(embedder.layers)}
    del said["batch"]  # changes nothing but rounding
    _check_settings(output, said)
    names = dict(zip(found.sources, outputs([s.name for s in found.sources]), strict=True))
    done = {row["path"]: row for row in read_jsonl(os.path.join(output, FILES))}
    todo = [s for s in found.sources if not _is_done(s, names[s], done, output)]
    rows = [done[s.path] for s in found.sources if s not in set(todo)]
    if rows:
        progress.note(f"{len(rows)} of {len(found.sources)} files are done already")
    # LeftOut of every file that could not be used, by its source
    failed: dict[SourceFile, SkippedFile] = {}
    staging = os.path.join(output, ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    os.makedirs(staging)
    written = JsonlFile(os.path.join(output, FILES), lambda row: True)
    with progress.bar("embedding", sum(source.size for source in todo), "B") as bar:
        advance = _Advance(bar)
        for source, outcome in ExtractionRun(embedder, output, staging, names, dtype, advance)(
            todo
        ):
            if isinstance(outcome, SkippedFile):
                failed[source] = outcome
            else:
                written.write(outcome)
                rows.append(outcome)
            advance.files += 1
    written.close()
    shutil.rmtree(staging)
    if settings.pool == "mean" and rows:
        rows.sort(key=lambda row: row["name"])
        with files.atomic_write(os.path.join(output, TABLE), replace=True) as path:
            table.write_table(path, _means(rows, output), embedder.layers)
    other = [name for name, reason, _ in found.left_out if reason == NOT_AUDIO]
    bad = [x for x in found.left_out if x[1] != NOT_AUDIO]
    bad += sorted((source.name, e.reason, e.detail) for source, e in failed.items())
    report = {
        "files": len(found.sources) + len(found.left_out),
        "embedded": len(rows),
        "seconds": sum(row["seconds"] for row in rows),
        "failed": [dict(zip(("name", "reason", "detail"), x, strict=True)) for x in bad],
        "not_audio": other,
        "upsampled": [row["name"] for row in rows if row["sample_rate"] < model.sample_rate],
        "settings": said,
    }
    with (
        files.atomic_write(os.path.join(output, REPORT), replace=True) as path,
        open(path, "w") as file,
    ):
        json.dump(report, file, indent=1)
    if not rows:
        raise UserError(f"none of {len(bad)} files can be used; {': '.join(bad[0])}")
    return report


class _Advance:
    """Moves a bar of bytes, and shows files and seconds of audio beside it."""

    def __init__(self, bar):
        self._bar, self._bytes, self._seconds, self.files = bar, 0.0, 0.0, 0

    def __call__(self, size: float, seconds: float) -> None:
        self._bytes, self._seconds = self._bytes + size, self._seconds + seconds
        speed = self._seconds / max(self._bar.format_dict["elapsed"], 1e-3)
        said = f"{self.files} files, {speed:.1f}x real time"
        self._bar.set_postfix_str(said, refresh=False)
        self._bar.update(round(self._bytes) - self._bar.n)


def outputs(names: Sequence[str]) -> list[str]:
    """For each file's name that of its hidden states: the suffix gives way to .npz, and stays in
    front of it where two files would have the same; a number sets apart what still is."""
    stems = collections.Counter(os.path.splitext(name)[0] for name in names)
    taken: collections.Counter[str] = collections.Counter()
    found = []
    for name in names:
        stem = os.path.splitext(name)[0]
        chosen = stem if stems[stem] == 1 else name
        taken[chosen] += 1
        found.append(f"{chosen}.npz" if taken[chosen] == 1 else f"{chosen}~{taken[chosen]}.npz")
    return found


def _check_settings(output: str, said: dict[str, Any]) -> None:
    path = os.path.join(output, SETTINGS)
    if os.path.exists(path):
        with open(path) as f:
            before = json.load(f)
        if changed := [key for key in said if before.get(key) != said[key]]:
            key = changed[0]
            raise UserError(
                f"{output} was made with {key}={before.get(key)}, now {key}={said[key]}; give "
                f"another --output, or remove {output}"
            )
        return
    with files.atomic_write(path) as temporary, open(temporary, "w") as f:
        json.dump(said, f, indent=1)


def _is_done(source: SourceFile, name: str, done: dict[str, Any], output: str) -> bool:
    row = done.get(source.path)
    same = row and (row["size"], row["mtime_ns"], row["output"]) == (*source[2:], name)
    return bool(same and os.path.exists(os.path.join(output, name)))


def _means(rows: list[dict[str, Any]], output: str) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    for row in rows:
        with np.load(os.path.join(output, row["output"])) as states:
            yield {k: row[k] for k in ("name", "seconds", "frames")}, states["hidden_states"]


def print_summary(report: dict[str, Any], output: str) -> None:
    """What was done, in a few lines."""
    hours = report["seconds"] / 3600
    print(f"{report['embedded']} of {report['files']} files ({hours:.2f} h) embedded in {output}")
    if report["upsampled"]:
        print(
            f"  {len(report['upsampled'])} have a lower rate than the model hears: what is above "
            f"it is missing; {report['upsampled'][0]} first"
        )
    if report["not_audio"]:
        print(f"  {len(report['not_audio'])} are no audio by their names")
    for file in report["failed"][:SHOWN]:
        print(f"  failed: {file['name']}: {file['reason']}, {file['detail']}")
    if (more := len(report["failed"]) - SHOWN) > 0:
        print(f"  and {more} more that failed, in {os.path.join(output, REPORT)}")


def _layer_numbers(text: str) -> tuple[int, ...]:
    if text == "all":
        return ()
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--layers={text} is not all, a number, or numbers with commas")
    return tuple(dict.fromkeys(map(int, parts)))


def main() -> int:
    """Run the command and return its exit code."""
    settings = EmbeddingSettings(
        layers=_layer_numbers(_LAYERS.value),
        pool=_POOL.value,
        chunk=_CHUNK_SECONDS.value,
        context=_CONTEXT_SECONDS.value,
        window=_WINDOW_SECONDS.value,
        batch=_BATCH_SECONDS.value,
    )
    arguments = _CHECKPOINT.value, cli.paths(_INPUT.value), _OUTPUT.value, settings, _DTYPE.value
    try:
        report = extract(*arguments)
    except KeyboardInterrupt:
        progress.note("stopped; what is done is kept: run the same command again to go on")
        return 130
    print_summary(report, _OUTPUT.value)
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    cli.run(main, FLAGS)
