"""What is said of a prepared dataset: report.json for programs, a screenful for people."""

import collections
import os
from collections.abc import Sequence
from typing import Any

from mert_jax.constants import SAMPLE_RATE
from mert_jax.data.decoding import is_audio_name
from mert_jax.data.preparation.selection import Selection

REPORT = "report.json"
_EXAMPLES = 10  # left-out files named on the screen; the report names all


def make_report(
    selection: Selection, not_decoded: Sequence[tuple[str, str, str]], metadata: dict[str, Any]
) -> dict[str, Any]:
    """What came in, what is in the dataset, and every file left out with its reason."""
    left_out = sorted([*selection.left_out, *not_decoded])
    reasons = collections.Counter(reason for _, reason, _ in left_out)
    rates = collections.Counter(f"{o.sample_rate} Hz" for o in selection.outcomes)
    formats = collections.Counter(o.format for o in selection.outcomes)
    channels = collections.Counter(str(o.channels) for o in selection.outcomes)
    return {
        "files": len(selection.tracks) + len(left_out),
        "tracks": len(selection.tracks),
        "hours": round(sum(t.samples for t in selection.tracks) / SAMPLE_RATE / 3600, 4),
        "sample_rates": dict(sorted(rates.items())),
        "channels": dict(sorted(channels.items())),
        "formats": dict(sorted(formats.items())),
        "splits": metadata["splits"],
        "short_tracks": metadata["short_tracks"],
        "clipped_samples": sum(o.clipped for o in selection.outcomes),
        "left_out_counts": dict(sorted(reasons.items())),
        "left_out": [{"path": p, "reason": r, "detail": d} for p, r, d in left_out],
        "fingerprint": metadata["fingerprint"],
        "settings": metadata["settings"],
    }


def print_summary(report: dict[str, Any], output: str) -> None:
    """Print a report for people: a screenful, with a few of the files left out."""
    settings = report["settings"]
    print(f"{output}: {_count(report['tracks'], 'track')}, {report['hours']:.2f} hours of music")
    for name, split in report["splits"].items():
        tracks, hours, count = split["tracks"], split["hours"], split["records"]
        print(f"  {name}: {_count(tracks, 'track')}, {hours:.2f} h, {_count(count, 'record')}")
    if not report["splits"]["validation"]["tracks"] and settings["validation_fraction"]:
        print("  note: a single track cannot be divided: all of it is in train, none in validation")
    for what in ("sample_rates", "formats"):
        counts = ", ".join(f"{key} x {n}" for key, n in report[what].items())
        print(f"  {what.replace('_', ' ')}: {counts}")
    print(f"  clipped samples: {report['clipped_samples']}")
    if report["short_tracks"]:
        crop = settings["crop_seconds"]
        print(f"  short tracks: {report['short_tracks']} (below {crop:g} s; training loops them)")
    counts = ", ".join(f"{n} {reason}" for reason, n in report["left_out_counts"].items())
    print(f"  left out: {counts or 'nothing'}")
    # pictures and texts are no news; a song that is not audio is
    left_out = report["left_out"]
    named = [x for x in left_out if x["reason"] != "not audio" or is_audio_name(x["path"])]
    for line in named[:_EXAMPLES]:
        print(f"    {line['path']}: {line['reason']} ({line['detail']})")
    print(f"  every file left out, with its reason: {os.path.join(output, REPORT)}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)
