"""A plan before you pay: `python -m mert_jax.plan --config=configs/large.py --topology=v5e:4x4`.

Compiles the training step of a config for TPUs that are not here and prints one JSON object: what
fits, what a step computes, moves and sends, bounds on its time, and the compiler's own estimate.
Needs the extra [plan] (the TPU compiler), and no TPU; `--topology=cpu:8` needs neither.
"""

import contextlib
import json
import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from mert_jax import cli, sharding
from mert_jax.errors import UserError
from mert_jax.planning import compile as compiling
from mert_jax.planning import estimate, search
from mert_jax.pretraining import build

FLAGS = flags.FlagValues()

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe, such as configs/large.py.", flag_values=FLAGS
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Devices, such as v5e:4x4, v4:2x2x4 or cpu:8.", flag_values=FLAGS
)
_CODES = flags.DEFINE_enum(
    "codes",
    None,
    ["stored", "computed"],
    "Where an RVQ-VAE's codes come from; left out, as the dataset (data.dir) has them.",
    flag_values=FLAGS,
)
_SEARCH = flags.DEFINE_bool(
    "search",
    False,
    "Try meshes, micro-batches, remat policies and unrolling; rank what fits.",
    flag_values=FLAGS,
)
_HLO = flags.DEFINE_string(
    "hlo", None, "A file to write the optimised program's text to.", flag_values=FLAGS
)


def main() -> None:
    """Print the plan."""
    with contextlib.redirect_stdout(sys.stderr):  # one JSON is all that goes there
        plan = make()
    print(json.dumps(rounded(plan), indent=1), flush=True)


def make() -> dict[str, Any]:
    """The plan that the flags ask for; UserError for settings that do not go together."""
    config = build.check(cli.config_of(_CONFIG))
    if not _TOPOLOGY.value:
        raise UserError("--topology=NAME is needed, such as --topology=v5e:4x4 or cpu:8")
    if _HLO.value:
        try:
            open(_HLO.value, "w").close()  # rather now than after minutes of compiling
        except OSError as e:
            raise UserError(f"--hlo={_HLO.value} cannot be written: {e.strerror}") from e
    where = compiling.make_topology(_TOPOLOGY.value)

    def one(config: Any) -> dict[str, Any]:
        print(f"compiling for {where.name}: minutes", flush=True)
        compiled = compiling.compile_step(config, where.devices, _CODES.value or "")
        if _HLO.value:
            with open(_HLO.value, "w") as file:
                file.write(compiled.text)
        return estimate.make_plan(config, where, compiled)

    if not _SEARCH.value:
        return one(config)
    sizes = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    mesh = sharding.make_mesh(*sizes, devices=where.devices)
    found = search.search(
        search.first(config, dict(mesh.shape)),
        search.variants(config, mesh.size),
        lambda setting: one(setting.of(config)),
    )
    keys = "fits hbm_peak_gib estimated_step_time_s collective_bound_s estimated_mfu compile_s"
    table = [
        setting._asdict() | {key: plan[key] for key in keys.split()} for setting, plan in found
    ]
    return found[0][1] | {"search": table}


def rounded(value: Any) -> Any:
    """`value` with six digits of every number that is not whole."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(x) for x in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


if __name__ == "__main__":
    cli.run(main, FLAGS)
