"""The prepared datasets that a config names, and what they store."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from mert_jax.constants import SAMPLE_RATE
from mert_jax.data import records
from mert_jax.data import stored_codes as codes
from mert_jax.errors import UserError


def dataset_directories(config: ConfigDict) -> list[str]:
    """The prepared datasets of `data.dir`."""
    return [name.strip() for name in config.data.dir.split(",") if name.strip()]


def find_stored_codes(config: ConfigDict) -> dict[str, codes.CodesInfo]:
    """What every dataset stores alike of the config's teachers, by name, as the first says it.

    Where datasets differ, a teacher with a checkpoint computes its codes instead, and a line is
    printed; UserError for one without.
    """
    stored = {}
    for name in config.teachers:
        found = {
            directory: codes.read_info(directory, name) for directory in dataset_directories(config)
        }
        first = next((directory for directory, info in found.items() if info), None)
        if not first:
            continue
        codec = found[first].codec
        others = [d for d, info in found.items() if not info or info.codec != codec]
        if not others:
            stored[name] = found[first]
            continue
        said = f"{others[0]} does not store the codes of {name} that {first} does"
        if not config.teacher.get(name, {}).get("checkpoint"):
            raise UserError(
                f"{said}; run python -m mert_jax.prepare --output={others[0]} --codes=CHECKPOINT "
                f"with the same codec, or set teacher.{name}.checkpoint to compute them"
            )
        print(f"{said}: they are computed for every dataset", flush=True)
    return stored


def open_datasets(config: ConfigDict, split: str, stored: dict[str, codes.CodesInfo]) -> list[Any]:
    """The records of each prepared dataset, with the codes it has `stored`; UserError when the
    clips asked for cannot be cut from it, and when files with more than the share `data.max_faulty`
    of its records are missing."""
    if not dataset_directories(config):
        raise UserError(
            "--config.data.dir=DIR is needed: a folder made by python -m mert_jax.prepare"
        )
    sources = []
    for directory in dataset_directories(config):
        overlap = records.metadata(directory)["overlap_samples"]
        if config.data.num_samples > overlap:
            raise UserError(
                f"clips of {config.data.num_samples} samples (data.num_samples) are longer than "
                f"the {overlap} that {directory} was prepared for; prepare it again with "
                f"--crop_seconds={config.data.num_samples / SAMPLE_RATE:g}"
            )
        own = {name: codes.read_info(directory, name) for name in stored}
        most = config.data.max_faulty
        source = records.open_source(directory, split, most)
        sources.append(codes.attach(source, directory, split, own, most))
    return sources


def dataset_summaries(config: ConfigDict) -> tuple[dict[str, Any], ...]:
    """A line on each dataset, for the model card."""
    weights = tuple(config.data.weights) or (None,) * len(dataset_directories(config))
    found = []
    for directory, weight in zip(dataset_directories(config), weights, strict=True):
        held = records.metadata(directory)
        train = held["splits"]["train"]
        found.append(
            dict(
                dataset=os.path.basename(os.path.abspath(directory)),
                tracks=train["tracks"],
                hours=train["hours"],
                weight="by its records" if weight is None else weight,
                fingerprint=held["fingerprint"],
            )
        )
    return tuple(found)


def check_unchanged(
    before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]], accept: bool
) -> None:
    """Raise UserError unless the `summaries` of the datasets are those the run began with.

    Where the caller accepts it, print what changed. A dataset that was moved has not changed, and
    a run that did not write down its datasets (`before` is empty) is taken as it is.
    """
    was, is_now = ([each["fingerprint"] for each in some] for some in (before, now))
    if was == is_now or not before:
        return
    named = lambda some: ", ".join(
        f"{each['dataset']} (fingerprint {each['fingerprint'][:8]})" for each in some
    )
    if sorted(was) == sorted(is_now):
        change = f"come in another order: {named(now)}; the run began with {named(before)}"
    elif len(was) == len(is_now):
        pairs = [
            (old, new)
            for old, new in zip(before, now, strict=True)
            if old["fingerprint"] != new["fingerprint"]
        ]
        old, new = zip(*pairs, strict=True)
        change = f"are not what the run began with: {named(old)} then, {named(new)} now"
    else:
        change = f"are {len(now)}: {named(now)}; the run began with {len(before)}: {named(before)}"
    if accept:
        print(f"the datasets {change}: accepted (data.accept_changes)", flush=True)
        return
    raise UserError(
        f"the datasets {change}. Bring the old ones back, or go on with other batches by "
        "--config.data.accept_changes=True"
    )
