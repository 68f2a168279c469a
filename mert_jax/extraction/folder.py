"""Embeds all recordings of some folders and files, and resumes where an earlier run stopped."""

import collections
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mert_jax import progress
from mert_jax.data.preparation.sources import SourceFile, SourceList, find_sources
from mert_jax.errors import UserError
from mert_jax.extraction.embedder import Embedder, EmbeddingSettings, Model, load
from mert_jax.extraction.files import embed_files
from mert_jax.files import JsonlFile, Row, atomic_write, directory_lock, read_jsonl, write_json

SETTINGS, FILES, REPORT, TABLE = "settings.json", "files.jsonl", "report.json", "features.parquet"
NOT_AUDIO = "not audio"  # reason of `find_sources` for a file whose suffix is not an audio format's
MAX_PRINTED = 20  # failures that the summary prints
TABLE_ROWS = 1024  # of the Parquet table that are in memory at a time


def extract(
    checkpoint: str, inputs: Sequence[str], output: str, settings: EmbeddingSettings, dtype: str
) -> dict[str, Any]:
    """Embed the audio files of `inputs` and return the report.

    Raises UserError for inputs without usable audio, an `output` made with other settings or that
    cannot be written, and as `load` does.
    """
    sources = find_sources(inputs, exclude=output)
    if not sources.sources:
        raise UserError(f"no audio in the {len(sources.left_out)} files of {','.join(inputs)}")
    model = load(checkpoint)
    try:
        with directory_lock(output):
            return _extract(model, sources, output, settings, np.dtype(dtype))
    except OSError as e:
        problem = f"cannot write {output}: {e.strerror or e}; free some space or give another one"
        raise UserError(f"{problem}, then run again (finished files are kept)") from e


def _extract(
    model: Model, sources: SourceList, output: str, settings: EmbeddingSettings, dtype: np.dtype
) -> dict[str, Any]:
    embedder = Embedder(model, settings)
    recorded = {"model": model.fingerprint, "dtype": dtype.name, **settings._asdict()}
    recorded["layers"] = list(embedder.layers)
    del recorded["batch"]  # changes the results by rounding only
    _check_settings(output, recorded)
    names = output_names([source.name for source in sources.sources])
    rows, failed = _embed(embedder, output, dict(zip(sources.sources, names, strict=True)), dtype)
    if settings.pool == "mean" and rows:
        _write_table(sorted(rows, key=lambda row: row["name"]), output, embedder.layers)
    failed = [x for x in sources.left_out if x[1] != NOT_AUDIO] + sorted(failed)
    report = {
        "files": len(sources.sources) + len(sources.left_out),
        "embedded": len(rows),
        "seconds": sum(row["seconds"] for row in rows),
        "failed": [dict(zip(("name", "reason", "detail"), x, strict=True)) for x in failed],
        "not_audio": [name for name, reason, _ in sources.left_out if reason == NOT_AUDIO],
        "upsampled": [row["name"] for row in rows if row["sample_rate"] < model.sample_rate],
        "settings": recorded,
    }
    write_json(os.path.join(output, REPORT), report)
    if not rows:
        raise UserError(f"none of {len(failed)} files can be used; {': '.join(failed[0])}")
    return report


def _embed(
    embedder: Embedder, output: str, names: Mapping[SourceFile, str], dtype: np.dtype
) -> tuple[list[Row], list[tuple[str, str, str]]]:
    """Embed what is not finished; return the rows of all embedded files, and the failures."""
    path = os.path.join(output, FILES)
    finished = {row["path"]: row for row in read_jsonl(path)}
    rows, failed, todo = [], [], {}
    for source, name in names.items():
        row = finished.get(source.path, {})
        same = (source._asdict() | {"output": name}).items() <= row.items()
        if same and os.path.exists(os.path.join(output, name)):
            rows.append(row)
        else:
            todo[source] = name
    if rows:
        progress.note(f"{len(rows)} of {len(names)} files are done already")
    log = JsonlFile(path, lambda row: True)
    with progress.bar("embedding", sum(source.size for source in todo), "B") as bar:
        for outcome in embed_files(embedder, todo, output, dtype, bar):
            if isinstance(outcome, dict):
                log.write(outcome)
                rows.append(outcome)
            else:
                source, error = outcome
                failed.append((source.name, error.reason, error.detail))
    log.close()
    return rows, failed


def output_names(names: Sequence[str]) -> list[str]:
    """Return the name of the .npz of each file: with its suffix replaced, if that is enough.

    The suffix is kept where two files differ by it only; names that still coincide are numbered.
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
        return write_json(path, settings)
    with open(path) as file:
        before = json.load(file)
    for key, value in settings.items():
        if before.get(key) != value:
            difference = f"{output} was made with {key}={before.get(key)}, now {key}={value}"
            raise UserError(f"{difference}; give another --output, or remove {output}")


def _write_table(rows: list[Row], output: str, layers: Sequence[int]) -> None:
    """Write the mean hidden states of all files as vectors, a column `layer_L` for each layer."""
    writer = None
    with atomic_write(os.path.join(output, TABLE), replace=True) as path:
        for start in range(0, len(rows), TABLE_ROWS):
            group = rows[start : start + TABLE_ROWS]
            states = [np.load(os.path.join(output, x["output"]))["hidden_states"] for x in group]
            columns = {x: [row[x] for row in group] for x in ("name", "seconds", "frames")}
            for layer, vectors in zip(layers, np.stack(states, 1), strict=True):
                flat, width = pa.array(vectors.reshape(-1)), vectors.shape[-1]
                columns[f"layer_{layer}"] = pa.FixedSizeListArray.from_arrays(flat, width)
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
        writer.close()


def summary(report: dict[str, Any], output: str) -> str:
    hours, upsampled, failed = report["seconds"] / 3600, report["upsampled"], report["failed"]
    files = f"{report['embedded']} of {report['files']} files"
    lines = [f"{files} ({hours:.2f} h) embedded in {output}"]
    if upsampled:
        lack = "have a lower sample rate than the model's, and lack the high frequencies"
        lines.append(f"  {len(upsampled)} {lack}; first {upsampled[0]}")
    if report["not_audio"]:
        lines.append(f"  {len(report['not_audio'])} are not audio, by their names")
    lines += [f"  failed: {x['name']}: {x['reason']}, {x['detail']}" for x in failed[:MAX_PRINTED]]
    if (more := len(failed) - MAX_PRINTED) > 0:
        lines.append(f"  and {more} more failures, listed in {os.path.join(output, REPORT)}")
    return "\n".join(lines)
