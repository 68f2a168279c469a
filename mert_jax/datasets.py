"""The prepared datasets that a config names, and what they store."""

import os
from typing import Any

from ml_collections import ConfigDict

from mert_jax import cli, codes, records


def directories(config: ConfigDict) -> list[str]:
    """The prepared datasets of `data.dir`."""
    return [name.strip() for name in config.data.dir.split(",") if name.strip()]


def stored_codes(config: ConfigDict) -> dict[str, codes.Info]:
    """What every dataset stores alike of the config's teachers, by name, as the first says it.

    Where datasets differ, a teacher with a checkpoint computes its codes instead, and a line is
    printed; UserError for one without.
    """
    stored = {}
    for name in config.teachers:
        found = {directory: codes.info(directory, name) for directory in directories(config)}
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
            raise cli.UserError(
                f"{said}; run python -m mert_jax.prepare --output={others[0]} --codes=CHECKPOINT "
                f"with the same codec, or set teacher.{name}.checkpoint to compute them"
            )
        print(f"{said}: they are computed for every dataset", flush=True)
    return stored


def open_datasets(config: ConfigDict, split: str, stored: dict[str, codes.Info]) -> list[Any]:
    """The records of each prepared dataset, with the codes it has `stored`; UserError when the
    clips asked for cannot be cut from it."""
    if not directories(config):
        raise cli.UserError(
            "--config.data.dir=DIR is needed: a folder made by python -m mert_jax.prepare"
        )
    sources = []
    for directory in directories(config):
        overlap = records.metadata(directory)["overlap_samples"]
        if config.data.num_samples > overlap:
            raise cli.UserError(
                f"clips of {config.data.num_samples} samples (data.num_samples) are longer than "
                f"the {overlap} that {directory} was prepared for; prepare it again with "
                f"--crop_seconds={config.data.num_samples / records.SAMPLE_RATE:g}"
            )
        own = {name: codes.info(directory, name) for name in stored}
        sources.append(codes.attach(records.open_source(directory, split), directory, split, own))
    return sources


def summaries(config: ConfigDict) -> tuple[dict[str, Any], ...]:
    """A line on each dataset, for the model card."""
    weights = tuple(config.data.weights) or (None,) * len(directories(config))
    found = []
    for directory, weight in zip(directories(config), weights, strict=True):
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
