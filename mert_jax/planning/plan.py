"""Plans a config for devices that need not be present: one setting, or the best of several."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from mert_jax import progress, sharding
from mert_jax.errors import UserError
from mert_jax.planning import compilation, estimate
from mert_jax.pretraining import build

Plan = dict[str, Any]
# the columns of a search's table, beside the setting
SEARCH_KEYS = tuple(
    "fits hbm_peak_gib estimated_step_time_s collective_bound_s estimated_mfu compile_s".split()
)


class Setting(NamedTuple):
    """Layout of an update on devices, which a search may change without changing the result."""

    data: int
    fsdp: int
    tensor: int
    remat: str
    accumulation: int
    unroll: int

    def apply(self, config: ConfigDict) -> ConfigDict:
        """Return a copy of `config` with this setting."""
        config = config.copy_and_resolve_references()
        config.mesh.update(data=self.data, fsdp=self.fsdp, tensor=self.tensor)
        config.model.update(remat=self.remat, unroll=self.unroll)
        config.accumulation = self.accumulation
        return config


Stage = Callable[[Setting], list[Setting]]


def make_plan(
    config: ConfigDict,
    topology: str | None,
    codes: str | None = None,
    search_settings: bool = False,
    hlo_file: str | None = None,
) -> Plan:
    """Return the plan of `config` on the devices of `topology`, such as "v5e:4x4" or "cpu:8".

    codes: "stored" or "computed", None to follow the dataset. search_settings: return the best
    setting's, with a table of all under "search". hlo_file: for the optimised program.
    """
    build.check(config)
    if not topology:
        raise UserError("--topology=NAME is needed, such as --topology=v5e:4x4 or cpu:8")
    try:
        if hlo_file:
            Path(hlo_file).write_text("")  # fail now instead of after minutes of compiling
    except OSError as e:
        raise UserError(f"--hlo={hlo_file} cannot be written: {e.strerror}") from e
    target = compilation.make_topology(topology)

    def plan_one(config: ConfigDict) -> Plan:
        print(f"compiling for {target.name}: minutes", flush=True)
        compiled = compilation.compile_step(config, target.devices, codes or "")
        if hlo_file:
            Path(hlo_file).write_text(compiled.text)
        return estimate.make_plan(config, target, compiled)

    if not search_settings:
        return plan_one(config)
    mesh = sharding.make_mesh(**config.mesh, devices=target.devices)
    model = config.model
    own = Setting(*mesh.shape.values(), model.remat, config.accumulation, model.unroll)
    stages = make_stages(config, mesh.size)
    ranked = search(own, stages, lambda setting: plan_one(setting.apply(config)))
    rows = [setting._asdict() | {key: plan[key] for key in SEARCH_KEYS} for setting, plan in ranked]
    return ranked[0][1] | {"search": rows}


def make_stages(config: ConfigDict, devices: int) -> list[Stage]:
    """Return the stages of a search, each from a setting to those that differ in one respect."""

    def accumulations(s: Setting) -> list[Setting]:
        splits, clips = (1, 2, 4, 8, 16), math.lcm(config.group, s.data * s.fsdp)
        numbers = {*splits, *(s.accumulation * n for n in splits)}
        possible = [n for n in numbers if config.batch_size % (n * clips) == 0]
        # the four next to the config's own, since each takes minutes to compile
        possible.sort(key=lambda n: abs(math.log(n / s.accumulation)))
        return [s._replace(accumulation=n) for n in possible[:4]]

    def meshes(s: Setting) -> list[Setting]:
        sizes = (1, 1), (devices, 1), (8, 1), (1, 2), (1, 4)  # of fsdp and tensor
        shapes = [(devices // (f * t), f, t) for f, t in sizes if devices % (f * t) == 0]
        return [s._replace(data=d, fsdp=f, tensor=t) for d, f, t in shapes]

    def remats(s: Setting) -> list[Setting]:
        return [s._replace(remat=remat) for remat in ("none", "dots", "full")]

    def unrolls(s: Setting) -> list[Setting]:
        return [s._replace(unroll=unroll) for unroll in (1, config.model.num_layers)]

    # first what decides whether a step fits: the times of one that does not are unknown
    return [accumulations, meshes, remats, unrolls]


def search(
    start: Setting, stages: list[Stage], make: Callable[[Setting], Plan]
) -> list[tuple[Setting, Plan]]:
    """Return plans, the best first; each stage starts from the best so far."""
    plans: dict[Setting, Plan] = {}
    errors: dict[Setting, UserError] = {}
    for i, stage in enumerate([lambda setting: [setting], *stages]):
        best = min(plans, key=lambda setting: rank(plans[setting]), default=start)
        settings = [s for s in dict.fromkeys(stage(best)) if s not in plans and s not in errors]
        with progress.bar(f"stage {i} of {len(stages)}", len(settings), "plan") as bar:
            for setting in settings:
                try:
                    plans[setting] = make(setting)
                except UserError as e:
                    errors[setting] = e
                    progress.note(f"left out {setting}: {e}")
                bar.update()
    if not plans:
        raise errors[start]
    return sorted(plans.items(), key=lambda pair: rank(pair[1]))


def rank(plan: Plan) -> tuple[bool, float]:
    """Return a plan's sorting key: those that fit first, by time, the others by memory."""
    if not plan["fits"] or plan["estimated_step_time_s"] is None:
        return not plan["fits"], plan["hbm_peak_gib"]
    return False, plan["estimated_step_time_s"] + plan["collective_bound_s"]


def rounded(plan: Plan) -> Plan:
    """Round every float of a plan to six digits."""
    return json.loads(json.dumps(plan), parse_float=lambda text: float(f"{float(text):.6g}"))
