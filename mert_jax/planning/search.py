"""Other settings of the same recipe on the same devices, and which of them is best."""

import datetime
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mert_jax.errors import UserError


class Setting(NamedTuple):
    """What a search may change: the update stays the same, only where and when it is computed."""

    data: int
    fsdp: int
    tensor: int
    remat: str
    accumulation: int
    unroll: int

    def of(self, config: ConfigDict) -> ConfigDict:
        """`config` with this setting."""
        config = config.copy_and_resolve_references()
        config.mesh.update(data=self.data, fsdp=self.fsdp, tensor=self.tensor)
        config.model.update(remat=self.remat, unroll=self.unroll)
        config.accumulation = self.accumulation
        return config


def first(config: ConfigDict, mesh: dict[str, int]) -> Setting:
    """The config's own setting, on `mesh`."""
    own = config.model.remat, config.accumulation, config.model.unroll
    return Setting(mesh["data"], mesh["fsdp"], mesh["tensor"], *own)


def variants(config: ConfigDict, devices: int) -> list[Callable[[Setting], Iterator[Setting]]]:
    """The stages of a search: from a setting to those that differ from it in one respect."""
    layers, splits = config.model.num_layers, (1, 2, 4, 8, 16)

    def meshes(s: Setting) -> Iterator[Setting]:
        for fsdp, tensor in ((1, 1), (devices, 1), (8, 1), (1, 2), (1, 4)):
            if devices % (fsdp * tensor) == 0:
                yield s._replace(data=devices // (fsdp * tensor), fsdp=fsdp, tensor=tensor)

    def accumulations(s: Setting) -> Iterator[Setting]:
        possible = []
        for accumulation in {*splits, *(s.accumulation * n for n in splits)}:
            micro_batch, rest = divmod(config.batch_size, accumulation)
            if not rest and not micro_batch % config.group and not micro_batch % (s.data * s.fsdp):
                possible.append(accumulation)
        # the four next to the config's own: each is a compile of minutes
        possible.sort(key=lambda n: abs(math.log(n / s.accumulation)))
        return (s._replace(accumulation=n) for n in possible[:4])

    def remats(s: Setting) -> Iterator[Setting]:
        return (s._replace(remat=remat) for remat in ("none", "dots", "full"))

    def unrolls(s: Setting) -> Iterator[Setting]:
        return (s._replace(unroll=unroll) for unroll in (1, layers))

    # what fits comes first: of what does not, the times are not known
    return [accumulations, meshes, remats, unrolls]


def search(
    start: Setting,
    stages: list[Callable[[Setting], Iterator[Setting]]],
    plan: Callable[[Setting], dict[str, Any]],
) -> list[tuple[Setting, dict[str, Any]]]:
    """Plans from the best to the worst: stage by stage, from the best so far.

    Those that fit come first, by estimated time and collectives one after the other; then those
    that do not, by the memory they need. A setting that cannot be is left out; the UserError of the
    first where none can.
    """
    plans: dict[Setting, dict[str, Any]] = {}
    wrong: dict[Setting, UserError] = {}
    begun = time.monotonic()
    best = lambda: min(plans, key=lambda s: rank(plans[s]), default=start)
    for i, stage in enumerate([lambda s: iter([s]), *stages]):
        settings = [s for s in dict.fromkeys(stage(best())) if s not in {**plans, **wrong}]
        for j, setting in enumerate(settings):
            left = len(settings) - j + sum(len(list(rest(best()))) - 1 for rest in stages[i:])
            eta = left * (time.monotonic() - begun) / max(len(plans), 1)
            said = str(datetime.timedelta(seconds=round(eta))) if plans else "?"
            print(f"{len(plans)} plans, about {left} left, eta {said}: {setting}", file=sys.stderr)
            try:
                plans[setting] = plan(setting)
            except UserError as e:
                wrong[setting] = e
                print(f"  left out: {e}", file=sys.stderr)
    if not plans:
        raise wrong[start]
    return sorted(plans.items(), key=lambda pair: rank(pair[1]))


def rank(plan: dict[str, Any]) -> tuple[bool, float]:
    """What a search makes as small as it can."""
    if not plan["fits"] or plan["estimated_step_time_s"] is None:
        return not plan["fits"], plan["hbm_peak_gib"]
    return False, plan["estimated_step_time_s"] + plan["collective_bound_s"]
