"""Selects the tracks of a dataset among decoded files, describes the dataset, and reports on it."""

import collections
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from mert_jax.constants import HOP_LENGTH, SAMPLE_RATE
from mert_jax.data import records
from mert_jax.data.decoding import is_audio_name
from mert_jax.data.preparation import assemble
from mert_jax.data.preparation.sources import Outcome, SourceFile

REPORT = "report.json"
_FORMAT = 1  # of decoding and records; datasets of another format are not added to
_NUM_PRINTED = 10  # skipped files in the summary; the report names all


class PreparationSettings(NamedTuple):
    """Settings that determine the content of a dataset, given the music."""

    chunk_seconds: float = 30.0
    crop_seconds: float = 5.12
    min_seconds: float = 1.0
    validation_fraction: float = 0.05
    format: int = _FORMAT

    @property
    def chunk_samples(self) -> int:
        """Samples of a full record, a multiple of the hop."""
        return _round_to_hops(self.chunk_seconds)

    @property
    def overlap_samples(self) -> int:
        """Samples that neighbouring records share, a multiple of the hop."""
        return _round_to_hops(self.crop_seconds)


def _round_to_hops(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE / HOP_LENGTH) * HOP_LENGTH


class Selection(NamedTuple):
    """The tracks of a dataset, their outcomes, and (name, reason, detail) of every other file."""

    tracks: list[assemble.Track]
    outcomes: list[Outcome]
    left_out: list[tuple[str, str, str]]


def select(files: Sequence[tuple[SourceFile, Outcome]], min_seconds: float) -> Selection:
    """Select the decoded files that are long enough, the first of those with equal content."""
    tracks: dict[str, assemble.Track] = {}
    outcomes, left_out = [], []
    for source, outcome in files:
        seconds = outcome.samples / SAMPLE_RATE
        if outcome.reason:
            left_out.append((source.name, outcome.reason, outcome.detail))
        elif seconds < min_seconds:
            detail = f"{seconds:.2f} s; --min_seconds={min_seconds:g}"
            left_out.append((source.name, "too short", detail))
        elif outcome.track in tracks:
            detail = f"same content as {tracks[outcome.track].path}"
            left_out.append((source.name, "duplicate", detail))
        else:
            tracks[outcome.track] = assemble.Track(outcome.track, source.name, outcome.samples)
            outcomes.append(outcome)
    return Selection(list(tracks.values()), outcomes, left_out)


def _hours(tracks: Sequence[assemble.Track]) -> float:
    return round(sum(track.samples for track in tracks) / SAMPLE_RATE / 3600, 4)


def describe(
    splits: dict[str, list[assemble.Track]], settings: PreparationSettings
) -> dict[str, Any]:
    """Return the metadata of a dataset, as `records.metadata` reads it."""
    chunk, overlap = settings.chunk_samples, settings.overlap_samples
    tracks = [track for split in splits.values() for track in split]
    return {
        "sample_rate": SAMPLE_RATE,
        "hop_length": HOP_LENGTH,
        "chunk_samples": chunk,
        "overlap_samples": overlap,
        "splits": {
            name: {
                "hours": _hours(split),
                "records": sum(len(records.chunk_spans(t.samples, chunk, overlap)) for t in split),
                "tracks": len(split),
            }
            for name, split in splits.items()
        },
        "short_tracks": sum(track.samples < overlap for track in tracks),
        "fingerprint": records.fingerprint(
            [(track.track, track.samples) for track in tracks], settings._asdict()
        ),
        "settings": settings._asdict(),
    }


def make_report(
    selection: Selection, not_decoded: Sequence[tuple[str, str, str]], metadata: dict[str, Any]
) -> dict[str, Any]:
    """Return the content of report.json: the dataset, and every skipped file with its reason."""
    left_out = sorted([*selection.left_out, *not_decoded])

    def count(values: Sequence[str]) -> dict[str, int]:
        return dict(sorted(collections.Counter(values).items()))

    return {
        "files": len(selection.tracks) + len(left_out),
        "tracks": len(selection.tracks),
        "hours": _hours(selection.tracks),
        "sample_rates": count([f"{outcome.sample_rate} Hz" for outcome in selection.outcomes]),
        "channels": count([str(outcome.channels) for outcome in selection.outcomes]),
        "formats": count([outcome.format for outcome in selection.outcomes]),
        "splits": metadata["splits"],
        "short_tracks": metadata["short_tracks"],
        "clipped_samples": sum(outcome.clipped for outcome in selection.outcomes),
        "left_out_counts": count([reason for _, reason, _ in left_out]),
        "left_out": [{"path": p, "reason": r, "detail": d} for p, r, d in left_out],
        "fingerprint": metadata["fingerprint"],
        "settings": metadata["settings"],
    }


def count_reasons(report: dict[str, Any]) -> str:
    """Return how many files were skipped for each reason, as text."""
    return ", ".join(f"{n} {reason}" for reason, n in report["left_out_counts"].items())


def print_summary(report: dict[str, Any], output: str) -> None:
    """Print a summary of a report, with some of the skipped files."""

    def plural(number: int, noun: str) -> str:
        return f"{number} {noun}" + "s" * (number != 1)

    settings = report["settings"]
    print(f"{output}: {plural(report['tracks'], 'track')}, {report['hours']:.2f} hours of music")
    for name, split in report["splits"].items():
        tracks, count = plural(split["tracks"], "track"), plural(split["records"], "record")
        print(f"  {name}: {tracks}, {split['hours']:.2f} h, {count}")
    if not report["splits"]["validation"]["tracks"] and settings["validation_fraction"]:
        print("  note: a single track cannot be divided: all of it is in train, none in validation")
    for key in ("sample_rates", "formats"):
        counts = ", ".join(f"{value} x {n}" for value, n in report[key].items())
        print(f"  {key.replace('_', ' ')}: {counts}")
    print(f"  clipped samples: {report['clipped_samples']}")
    if report["short_tracks"]:
        crop = settings["crop_seconds"]
        print(f"  short tracks: {report['short_tracks']} (below {crop:g} s; training loops them)")
    print(f"  left out: {count_reasons(report) or 'nothing'}")
    # pictures and texts among the music are expected; a song that is not audio is not
    left_out = report["left_out"]
    unexpected = [x for x in left_out if x["reason"] != "not audio" or is_audio_name(x["path"])]
    for line in unexpected[:_NUM_PRINTED]:
        print(f"    {line['path']}: {line['reason']} ({line['detail']})")
    print(f"  every file left out, with its reason: {os.path.join(output, REPORT)}")
