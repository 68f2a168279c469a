"""Selects the tracks of a dataset among decoded files, describes the dataset, and reports on it."""

import collections
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mert_jax.constants import HOP_LENGTH, SAMPLE_RATE
from mert_jax.data import records
from mert_jax.data.decoding import is_audio_name
from mert_jax.data.preparation.assemble import Splits, Track
from mert_jax.data.preparation.sources import Outcome, SourceFile

REPORT = "report.json"
_NUM_PRINTED = 10  # skipped files in the summary; the report names all
Skipped = tuple[str, str, str]  # name, reason, detail


class PreparationSettings(NamedTuple):
    """Settings that determine the content of a dataset, given the music."""

    chunk_seconds: float = 30.0
    crop_seconds: float = 5.12
    min_seconds: float = 1.0
    validation_fraction: float = 0.05
    format: int = 1  # of decoding and records; datasets of another format are not added to

    def sizes(self) -> tuple[int, int]:
        """Return the samples of a full record, and those that neighbours share."""
        hops = (x * SAMPLE_RATE / HOP_LENGTH for x in (self.chunk_seconds, self.crop_seconds))
        return tuple(round(x) * HOP_LENGTH for x in hops)


def select(
    files: Iterable[tuple[SourceFile, Outcome]], min_seconds: float
) -> tuple[list[Track], list[Outcome], list[Skipped]]:
    """Return the long enough tracks, the first of equal ones, their outcomes, and other files."""
    tracks: dict[str, Track] = {}
    outcomes, left_out = [], []
    for source, outcome in files:
        seconds, reason, detail = outcome.samples / SAMPLE_RATE, outcome.reason, outcome.detail
        if not reason and seconds < min_seconds:
            reason, detail = "too short", f"{seconds:.2f} s; --min_seconds={min_seconds:g}"
        elif not reason and outcome.track in tracks:
            reason, detail = "duplicate", f"same content as {tracks[outcome.track].path}"
        if reason:
            left_out.append((source.name, reason, detail))
        else:
            tracks[outcome.track] = Track(outcome.track, source.name, outcome.samples)
            outcomes.append(outcome)
    return list(tracks.values()), outcomes, left_out


def describe(splits: Splits, settings: PreparationSettings) -> dict[str, Any]:
    """Return the metadata of a dataset; the fingerprint is of its tracks and settings."""
    chunk, overlap = settings.sizes()
    tracks = [track for split in splits.values() for track in split]
    content = [sorted((track.track, track.samples) for track in tracks), settings._asdict()]
    content = json.dumps(content, sort_keys=True).encode()
    summaries = {}
    for name, split in splits.items():
        count = sum(len(records.chunk_spans(t.samples, chunk, overlap)) for t in split)
        hours = round(sum(track.samples for track in split) / SAMPLE_RATE / 3600, 4)
        summaries[name] = dict(hours=hours, records=count, tracks=len(split))
    return {
        "sample_rate": SAMPLE_RATE,
        "hop_length": HOP_LENGTH,
        "chunk_samples": chunk,
        "overlap_samples": overlap,
        "splits": summaries,
        "short_tracks": sum(track.samples < overlap for track in tracks),
        "fingerprint": hashlib.blake2b(content, digest_size=16).hexdigest(),
        "settings": settings._asdict(),
    }


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(collections.Counter(values).items()))


def make_report(
    outcomes: Sequence[Outcome], left_out: Iterable[Skipped], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of report.json: the dataset, and every skipped file with its reason."""
    left_out, samples = sorted(left_out), sum(outcome.samples for outcome in outcomes)
    return {
        "files": len(outcomes) + len(left_out),
        "tracks": len(outcomes),
        "hours": round(samples / SAMPLE_RATE / 3600, 4),
        "sample_rates": _count(f"{outcome.sample_rate} Hz" for outcome in outcomes),
        "channels": _count(str(outcome.channels) for outcome in outcomes),
        "formats": _count(outcome.format for outcome in outcomes),
        "splits": metadata["splits"],
        "short_tracks": metadata["short_tracks"],
        "clipped_samples": sum(outcome.clipped for outcome in outcomes),
        "left_out_counts": _count(reason for _, reason, _ in left_out),
        "left_out": [{"path": p, "reason": r, "detail": d} for p, r, d in left_out],
        "fingerprint": metadata["fingerprint"],
        "settings": metadata["settings"],
    }


def count_reasons(report: Mapping[str, Any]) -> str:
    """Return how many files were skipped for each reason, as text."""
    return ", ".join(f"{n} {reason}" for reason, n in report["left_out_counts"].items())


def print_summary(report: Mapping[str, Any], output: str) -> None:
    """Print a summary of a report, with some of the skipped files."""
    splits, fraction = report["splits"], report["settings"]["validation_fraction"]
    print(f"{output}: {report['tracks']} tracks, {report['hours']:.2f} hours of music")
    for name, split in splits.items():
        print("  {}: {tracks} tracks, {hours:.2f} h, {records} records".format(name, **split))
    if fraction and not splits["validation"]["tracks"]:
        print("  note: a single track cannot be divided: all of it is in train, none in validation")
    print(f"  left out: {count_reasons(report) or 'nothing'}")
    # pictures and texts among the music are expected; a song that is not audio is not
    left_out = report["left_out"]
    unexpected = [x for x in left_out if x["reason"] != "not audio" or is_audio_name(x["path"])]
    for line in unexpected[:_NUM_PRINTED]:
        print(f"    {line['path']}: {line['reason']} ({line['detail']})")
    print(f"  formats, clipping, and every file left out: {os.path.join(output, REPORT)}")
