"""Embeds all recordings of some folders and files, and resumes where an earlier run stopped."""

import collections
import json
import os
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mert_jax import progress
from mert_jax.data.decoding import SkippedFile
from mert_jax.data.preparation.sources import SourceFile, SourceList, find_sources
from mert_jax.errors import UserError
from mert_jax.extraction.embedder import Embedder, EmbeddingSettings, Model, load
from mert_jax.extraction.files import embed_files
from mert_jax.files import JsonlFile, Row, atomic_write, directory_lock, read_jsonl

SETTINGS, FILES, REPORT, TABLE = "settings.json", "files.jsonl", "report.json", "features.parquet"
NOT_AUDIO = "not audio"  # reason of `find_sources` for a file whose suffix is not an audio format's
MAX_PRINTED = 20  # failures that the summary prints
TABLE_ROWS = 1024  # of the Parquet table that are in memory at a time


def extract(
    checkpoint: str, inputs: Sequence[str], output: str, settings: EmbeddingSettings, dtype: str
) -> dict[str, Any]:
    """Embed the audio files of `inputs` and return the report.

    Raises UserError for a checkpoint that cannot be read, for inputs without usable audio, for an
    `output` made with other settings, and for a disk that is full or cannot be written.
    """
    sources = find_sources(inputs, exclude=output)
    if not sources.sources:
        raise UserError(f"no audio in the {len(sources.left_out)} files of {','.join(inputs)}")
    model = load(checkpoint)
    try:
        with directory_lock(output):
            return _extract(model, sources, output, settings, np.dtype(dtype))
    except OSError as e:
        raise UserError(
            f"cannot write {output}: {e.strerror or e}; free some space or give another --output, "
            "then run the command again (finished files are kept)"
        ) from e


def _extract(
    model: Model, sources: SourceList, output: str, settings: EmbeddingSettings, dtype: np.dtype
) -> dict[str, Any]:
    embedder = Embedder(model, settings)
    recorded = {"model": model.fingerprint, "dtype": dtype.name, **settings._asdict()}
    recorded["layers"] = list(embedder.layers)
    del recorded["batch"]  # changes the results by rounding only
    _check_settings(output, recorded)
    names = output_names([source.name for source in sources.sources])
    names = dict(zip(sources.sources, names, strict=True))
    rows, failed = _embed(embedder, output, names, dtype)
    if settings.pool == "mean" and rows:
        _write_table(sorted(rows, key=lambda row: row["name"]), output, embedder.layers)
    failures = [row for row in sources.left_out if row[1] != NOT_AUDIO]
    failures += sorted((source.name, e.reason, e.detail) for source, e in failed.items())
    report = {
        "files": len(sources.sources) + len(sources.left_out),
        "embedded": len(rows),
        "seconds": sum(row["seconds"] for row in rows),
        "failed": [dict(zip(("name", "reason", "detail"), x, strict=True)) for x in failures],
        "not_audio": [name for name, reason, _ in sources.left_out if reason == NOT_AUDIO],
        "upsampled": [row["name"] for row in rows if row["sample_rate"] < model.sample_rate],
        "settings": recorded,
    }
    _write_json(os.path.join(output, REPORT), report)
    if not rows:
        raise UserError(f"none of {len(failures)} files can be used; {': '.join(failures[0])}")
    return report


def _embed(
    embedder: Embedder, output: str, names: dict[SourceFile, str], dtype: np.dtype
) -> tuple[list[Row], dict[SourceFile, SkippedFile]]:
    """Embed what is not finished; return the rows of all embedded files, and the failures."""
    log = os.path.join(output, FILES)
    finished = {row["path"]: row for row in read_jsonl(log)}
    rows, todo, failed = [], [], {}
    for source, name in names.items():
        row = finished.get(source.path)
        same = row and (row["size"], row["mtime_ns"], row["output"]) == (*source[2:], name)
        if same and os.path.exists(os.path.join(output, name)):
            rows.append(row)
        else:
            todo.append(source)
    if rows:
        progress.note(f"{len(rows)} of {len(names)} files are done already")
    staging = os.path.join(output, ".staging")
    shutil.rmtree(staging, ignore_errors=True)
    os.makedirs(staging)
    log, seconds_done = JsonlFile(log, lambda row: True), 0.0
    with progress.bar("embedding", sum(source.size for source in todo), "B") as bar:

        def on_progress(size: float, seconds: float) -> None:
            nonlocal seconds_done
            seconds_done += seconds
            speed = seconds_done / max(bar.format_dict["elapsed"], 1e-3)
            bar.set_postfix_str(f"{len(rows)} files, {speed:.1f}x real time", refresh=False)
            bar.update(size)

        outcomes = embed_files(embedder, todo, names, output, staging, dtype, on_progress)
        for source, outcome in outcomes:
            if isinstance(outcome, SkippedFile):
                failed[source] = outcome
            else:
                log.write(outcome)
                rows.append(outcome)
    log.close()
    shutil.rmtree(staging)
    return rows, failed


def output_names(names: Sequence[str]) -> list[str]:
    """Return the name of the .npz of each file; no two are the same.

    The suffix is replaced by .npz, or kept before it where two files differ by their suffixes only;
    names that still coincide are numbered.
    """
    stems = [os.path.splitext(name)[0] for name in names]
    counts, used = collections.Counter(stems), collections.Counter()
    outputs = []
    for name, stem in zip(names, stems, strict=True):
        base = stem if counts[stem] == 1 else name
        used[base] += 1
        outputs.append(f"{base}.npz" if used[base] == 1 else f"{base}~{used[base]}.npz")
    return outputs


def _check_settings(output: str, settings: dict[str, Any]) -> None:
    path = os.path.join(output, SETTINGS)
    if not os.path.exists(path):
        _write_json(path, settings)
        return
    with open(path) as file:
        before = json.load(file)
    for key, value in settings.items():
        if before.get(key) != value:
            raise UserError(
                f"{output} was made with {key}={before.get(key)}, now {key}={value}; give another "
                f"--output, or remove {output}"
            )


def _write_table(rows: list[Row], output: str, layers: Sequence[int]) -> None:
    """Write the mean hidden states of all files as vectors, a column `layer_L` for each layer."""
    columns = ("name", "seconds", "frames")
    writer = None
    with atomic_write(os.path.join(output, TABLE), replace=True) as path:
        for start in range(0, len(rows), TABLE_ROWS):
            group, states = rows[start : start + TABLE_ROWS], []
            for row in group:
                with np.load(os.path.join(output, row["output"])) as arrays:
                    states.append(arrays["hidden_states"])
            arrays = {name: pa.array([row[name] for row in group]) for name in columns}
            for layer, vectors in zip(layers, np.stack(states, 1), strict=True):
                flat = pa.array(vectors.reshape(-1))
                vectors = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[-1])
                arrays[f"layer_{layer}"] = vectors
            batch = pa.table(arrays)
            writer = writer or pq.ParquetWriter(path, batch.schema)
            writer.write_table(batch)
        writer.close()


def _write_json(path: str, value: Any) -> None:
    with atomic_write(path, replace=True) as temporary, open(temporary, "w") as file:
        json.dump(value, file, indent=1)


def summary(report: dict[str, Any], output: str) -> str:
    """Return the report in a few lines."""
    hours, upsampled = report["seconds"] / 3600, report["upsampled"]
    lines = [
        f"{report['embedded']} of {report['files']} files ({hours:.2f} h) embedded in {output}"
    ]
    if upsampled:
        lines.append(
            f"  {len(upsampled)} have a lower sample rate than the model's, and lack the high "
            f"frequencies; first {upsampled[0]}"
        )
    if report["not_audio"]:
        lines.append(f"  {len(report['not_audio'])} are not audio, by their names")
    for file in report["failed"][:MAX_PRINTED]:
        lines.append(f"  failed: {file['name']}: {file['reason']}, {file['detail']}")
    if (more := len(report["failed"]) - MAX_PRINTED) > 0:
        lines.append(f"  and {more} more failures, listed in {os.path.join(output, REPORT)}")
    return "\n".join(lines)
