"""The prepared datasets of a run: the codes that they store, their records, and their identity."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mert_jax.constants import SAMPLE_RATE
from mert_jax.data import records, stored_codes
from mert_jax.data.stored_codes import CodesInfo
from mert_jax.errors import UserError


def find_stored_codes(
    directories: Sequence[str], checkpoints: Mapping[str, str]
) -> dict[str, CodesInfo]:
    """Return the codes that all datasets store of the same codec, by teacher.

    `checkpoints` has each teacher's, "" for none. If the datasets differ, a teacher with a
    checkpoint computes its codes and a line says so; without one, UserError is raised.
    """
    stored = {}
    for teacher, checkpoint in checkpoints.items():
        infos = {directory: stored_codes.read_info(directory, teacher) for directory in directories}
        with_codes = next((directory for directory, info in infos.items() if info), None)
        if not with_codes:
            continue
        info = infos[with_codes]
        others = [d for d, other in infos.items() if not other or other.codec != info.codec]
        if not others:
            stored[teacher] = info
            continue
        problem = f"{others[0]} does not store the codes of {teacher} that {with_codes} does"
        if not checkpoint:
            raise UserError(
                f"{problem}; run python -m mert_jax.prepare --output={others[0]} "
                f"--codes=CHECKPOINT with the same codec, or set teacher.{teacher}.checkpoint to "
                "compute them"
            )
        print(f"{problem}: they are computed for every dataset", flush=True)
    return stored


def open_datasets(
    directories: Sequence[str],
    split: str,
    stored: Mapping[str, CodesInfo],
    num_samples: int,
    max_faulty: float,
) -> list[Any]:
    """Open the records of each dataset, with the codes that it has `stored`.

    Raises UserError if clips of `num_samples` cannot be cut from a dataset, or if files with more
    than the fraction `max_faulty` of its records are missing.
    """
    sources = []
    for directory in directories:
        overlap = records.metadata(directory)["overlap_samples"]
        if num_samples > overlap:
            raise UserError(
                f"clips of {num_samples} samples (data.num_samples) are longer than the "
                f"{overlap} that {directory} was prepared for; prepare it again with "
                f"--crop_seconds={num_samples / SAMPLE_RATE:g}"
            )
        infos = {teacher: stored_codes.read_info(directory, teacher) for teacher in stored}
        source = records.open_source(directory, split, max_faulty)
        sources.append(stored_codes.attach(source, directory, split, infos, max_faulty))
    return sources


def dataset_summaries(
    directories: Sequence[str], weights: Sequence[float]
) -> tuple[dict[str, Any], ...]:
    """Return name, size, weight and fingerprint of each dataset, for the model card."""
    summaries = []
    for directory, weight in zip(directories, weights or [None] * len(directories), strict=True):
        metadata = records.metadata(directory)
        train = metadata["splits"]["train"]
        summaries.append(
            dict(
                dataset=os.path.basename(os.path.abspath(directory)),
                tracks=train["tracks"],
                hours=train["hours"],
                weight="by its records" if weight is None else weight,
                fingerprint=metadata["fingerprint"],
            )
        )
    return tuple(summaries)


def check_unchanged(
    before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], accept: bool
) -> None:
    """Raise UserError unless the datasets are those that the run began with.

    `before` and `now` are `dataset_summaries`; before the first run `before` is empty. A dataset
    that was only moved has not changed. With `accept`, a change is printed instead.
    """
    old, new = ([each["fingerprint"] for each in summaries] for summaries in (before, now))
    if old == new or not before:
        return

    def names(summaries: Sequence[Mapping[str, Any]]) -> str:
        return ", ".join(
            f"{each['dataset']} (fingerprint {each['fingerprint'][:8]})" for each in summaries
        )

    if sorted(old) == sorted(new):
        change = f"come in another order: {names(now)}; the run began with {names(before)}"
    elif len(old) == len(new):
        changed = [i for i in range(len(old)) if old[i] != new[i]]
        replaced, by = ([summaries[i] for i in changed] for summaries in (before, now))
        change = f"are not those the run began with: {names(replaced)} then, {names(by)} now"
    else:
        change = f"are {len(now)}: {names(now)}; the run began with {len(before)}: {names(before)}"
    if accept:
        print(f"the datasets {change}: accepted (data.accept_changes)", flush=True)
        return
    raise UserError(
        f"the datasets {change}. Restore the old ones, or continue with other batches by "
        "--config.data.accept_changes=True"
    )
