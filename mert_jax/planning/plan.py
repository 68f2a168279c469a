"""Plans a config for devices that need not be present, for one setting or the best of several."""

from typing import Any

from ml_collections import ConfigDict

from mert_jax import sharding
from mert_jax.errors import UserError
from mert_jax.planning import compile as compiling
from mert_jax.planning import estimate, search
from mert_jax.pretraining import build

# the columns of a search's table, beside the setting
SEARCH_KEYS = (
    *("fits", "hbm_peak_gib", "estimated_step_time_s"),
    *("collective_bound_s", "estimated_mfu", "compile_s"),
)


def make_plan(
    config: ConfigDict,
    topology: str | None,
    codes: str | None = None,
    search_settings: bool = False,
    hlo_file: str | None = None,
) -> dict[str, Any]:
    """Return the plan of `config` on the devices of `topology`, such as "v5e:4x4" or "cpu:8".

    codes: "stored" or "computed", None to follow the dataset. search_settings: return the plan of
    the best setting, with a table of all under "search". hlo_file: where to write the optimised
    program. Raises UserError for settings that do not go together.
    """
    build.check(config)
    if not topology:
        raise UserError("--topology=NAME is needed, such as --topology=v5e:4x4 or cpu:8")
    if hlo_file:
        try:
            open(hlo_file, "w").close()  # fail now instead of after minutes of compiling
        except OSError as e:
            raise UserError(f"--hlo={hlo_file} cannot be written: {e.strerror}") from e
    target = compiling.make_topology(topology)

    def plan_one(config: ConfigDict) -> dict[str, Any]:
        print(f"compiling for {target.name}: minutes", flush=True)
        compiled = compiling.compile_step(config, target.devices, codes or "")
        if hlo_file:
            with open(hlo_file, "w") as file:
                file.write(compiled.text)
        return estimate.make_plan(config, target, compiled)

    if not search_settings:
        return plan_one(config)
    sizes = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    mesh = sharding.make_mesh(*sizes, devices=target.devices)
    ranked = search.search(
        search.first(config, dict(mesh.shape)),
        search.variants(config, mesh.size),
        lambda setting: plan_one(setting.of(config)),
    )
    rows = [setting._asdict() | {key: plan[key] for key in SEARCH_KEYS} for setting, plan in ranked]
    return ranked[0][1] | {"search": rows}


def rounded(value: Any) -> Any:
    """Round every float in `value`, in dicts and lists too, to six digits."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(x) for x in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
