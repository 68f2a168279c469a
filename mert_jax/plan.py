"""Plan a run: `python -m mert_jax.plan --config=configs/large.py --topology=v5e:4x4`.

Compiles the training step of a config for TPUs without having any and prints one JSON object:
whether it fits, what a step computes, moves and sends, bounds on its time, and the compiler's own
estimate. Needs the extra [plan] (the TPU compiler) and no TPU; `--topology=cpu:8` needs neither.

With `--plans=a.json,b.json [--picture=scaling.png]`, prints such objects of TPUs side by side as a
Markdown table instead; the picture shows memory and collectives against the number of chips.
"""

import contextlib
import json
import sys

from absl import flags

from mert_jax import cli
from mert_jax.planning import plan, table

FLAGS = flags.FlagValues()
define = cli.Define(FLAGS)

_CONFIG = define.config_file("config", None, "Recipe, such as configs/large.py.")
_TOPOLOGY = define.string("topology", None, "Devices, such as v5e:4x4, v4:2x2x4 or cpu:8.")
_CODES = define.enum(
    "codes",
    None,
    ["stored", "computed"],
    "Source of an RVQ-VAE's codes (default: as the dataset, data.dir, has them).",
)
_SEARCH = define.bool(
    "search", False, "Try meshes, micro-batches, remat policies and unrolling, and rank them."
)
_HLO = define.string("hlo", None, "A file to write the text of the optimised program to.")
_PLANS = define.list("plans", None, "Print a table of these outputs of plan; patterns allowed.")
_PICTURE = define.string("picture", None, "A .png file to draw --plans into.")


def main() -> None:
    """Print a plan, or the table of several."""
    if _PLANS.value:
        table.print_table(_PLANS.value, _PICTURE.value)
        return
    config = cli.config_of(_CONFIG)
    with contextlib.redirect_stdout(sys.stderr):  # stdout holds the JSON object alone
        result = plan.make_plan(config, _TOPOLOGY.value, _CODES.value, _SEARCH.value, _HLO.value)
    print(json.dumps(plan.rounded(result), indent=1), flush=True)


if __name__ == "__main__":
    cli.run(main, FLAGS)
