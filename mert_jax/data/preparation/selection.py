"""Which decoded files make a dataset, by which settings, and the metadata that follows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mert_jax.constants import HOP_LENGTH, SAMPLE_RATE
from mert_jax.data import records
from mert_jax.data.preparation import assemble
from mert_jax.data.preparation.sources import Outcome, SourceFile

_FORMAT = 1  # of the decoding and the records; a dataset of another one is not added to


class PreparationSettings(NamedTuple):
    """What decides the content of a dataset, besides the music."""

    chunk_seconds: float = 30.0
    crop_seconds: float = 5.12
    min_seconds: float = 1.0
    validation_fraction: float = 0.05
    format: int = _FORMAT

    @property
    def chunk_samples(self) -> int:
        """Samples of a full record, a multiple of the hop."""
        return _on_hops(self.chunk_seconds)

    @property
    def overlap_samples(self) -> int:
        """Samples that neighbouring records share, a multiple of the hop."""
        return _on_hops(self.crop_seconds)


def _on_hops(seconds: float) -> int:
    return round(seconds * SAMPLE_RATE / HOP_LENGTH) * HOP_LENGTH


class Selection(NamedTuple):
    """The tracks a dataset is made of, and (name, reason, detail) of every other file."""

    tracks: list[assemble.Track]
    outcomes: list[Outcome]
    left_out: list[tuple[str, str, str]]


def select(files: Sequence[tuple[SourceFile, Outcome]], min_seconds: float) -> Selection:
    """Choose among decoded files, in their order: long enough, and each content once."""
    chosen: dict[str, assemble.Track] = {}
    outcomes, left_out = [], []
    for source, outcome in files:
        seconds = outcome.samples / SAMPLE_RATE
        if outcome.reason:
            left_out.append((source.name, outcome.reason, outcome.detail))
        elif seconds < min_seconds:
            detail = f"{seconds:.2f} s; --min_seconds={min_seconds:g}"
            left_out.append((source.name, "too short", detail))
        elif outcome.track in chosen:
            detail = f"same content as {chosen[outcome.track].path}"
            left_out.append((source.name, "duplicate", detail))
        else:
            chosen[outcome.track] = assemble.Track(outcome.track, source.name, outcome.samples)
            outcomes.append(outcome)
    return Selection(list(chosen.values()), outcomes, left_out)


def describe(
    splits: dict[str, list[assemble.Track]], settings: PreparationSettings
) -> dict[str, Any]:
    """The metadata of a dataset, as `records.metadata` returns it."""
    chunk, overlap = settings.chunk_samples, settings.overlap_samples
    tracks = [t for split in splits.values() for t in split]
    return {
        "sample_rate": SAMPLE_RATE,
        "hop_length": HOP_LENGTH,
        "chunk_samples": chunk,
        "overlap_samples": overlap,
        "splits": {
            name: {
                "hours": round(sum(t.samples for t in held) / SAMPLE_RATE / 3600, 4),
                "records": sum(len(records.chunk_spans(t.samples, chunk, overlap)) for t in held),
                "tracks": len(held),
            }
            for name, held in splits.items()
        },
        "short_tracks": sum(t.samples < overlap for t in tracks),
        "fingerprint": records.fingerprint(
            [(t.track, t.samples) for t in tracks], settings._asdict()
        ),
        "settings": settings._asdict(),
    }
