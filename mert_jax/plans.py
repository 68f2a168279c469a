"""Plans side by side: `python -m mert_jax.plans --plans=a.json,b.json [--picture=scaling.png]`.

Each file is what `python -m mert_jax.plan ... > a.json` printed of a TPU. Prints a Markdown table;
the picture shows how memory and collectives grow with the number of chips.
"""

import glob
import json
import os
from collections.abc import Sequence
from typing import Any

from absl import flags
from matplotlib import figure, ticker

from mert_jax import cli, files
from mert_jax.errors import UserError
from mert_jax.hardware import GIB

FLAGS = flags.FlagValues()

_PLANS = flags.DEFINE_list(
    "plans", None, "Files that plan printed; patterns such as plans/*.json.", flag_values=FLAGS
)
_PICTURE = flags.DEFINE_string(
    "picture", None, "A .png to draw, of several numbers of chips.", flag_values=FLAGS
)
HEADINGS = (
    "plan",
    "chips",
    "clips an update",
    "a chip",
    "step, ms",
    "MFU",
    "memory, GiB",
    "traffic a clip, GB",
    "matrix units, memory and links busy, %",
    "run, days",
    "clips/s a host",
    "limit",
)
Plan = dict[str, Any]


def main() -> None:
    """Print the table; draw the picture."""
    named = [read(path) for path in paths(_PLANS.value or [])]
    print("\n".join(table(named)), flush=True)
    if _PICTURE.value:
        with files.atomic_write(_PICTURE.value, replace=True) as path:
            picture([plan for _, plan in named]).savefig(path, format="png", dpi=130)


def paths(patterns: Sequence[str]) -> list[str]:
    """The files that the patterns name; UserError for one that names none."""
    found = [sorted(glob.glob(pattern)) for pattern in patterns]
    if not patterns or not all(found):
        missing = next((p for p, f in zip(patterns, found, strict=True) if not f), "")
        raise UserError(f"--plans={missing} is no file; give what mert_jax.plan has printed")
    return [path for some in found for path in some]


def read(path: str) -> tuple[str, Plan]:
    """A plan and its name; UserError where the file holds none of a TPU."""
    try:
        with open(path) as file:
            plan = json.load(file)
        shares(plan)
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise UserError(
            f"{path} is no plan of a TPU ({e!r}); write one by python -m mert_jax.plan "
            f"--topology=v5e:2x4 ... > {path}"
        ) from e
    return os.path.basename(path).removesuffix(".json"), plan


def shares(plan: Plan) -> dict[str, float]:
    """How much of the estimated step each part of a chip is busy for, at least."""
    step = plan["estimated_step_time_s"]
    return {
        "matrix units": plan["compute_bound_s"] / step,
        "memory traffic": plan["memory_bound_s"] / step,
        "links": plan["collective_bound_s"] / step,
    }


def limit(plan: Plan) -> str:
    """What a faster step would have to wait for: vector units where none of the others is busy for
    half of the step, memory where a tenth of it is left."""
    if plan["hbm_peak_gib"] > 0.9 * plan["hbm_capacity_gib"]:
        return "memory"
    name, share = max(shares(plan).items(), key=lambda pair: pair[1])
    return name if share > 0.5 else "vector units"


def table(named: Sequence[tuple[str, Plan]]) -> list[str]:
    """The lines of a table in Markdown, a row for each plan."""
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    return [line(HEADINGS), line(["---"] * len(HEADINGS)), *(line(row(*pair)) for pair in named)]


def row(name: str, plan: Plan) -> list[str]:
    """The cells of a plan."""
    step = plan["estimated_step_time_s"]
    each = f"{plan['micro_batch_per_device']:g}"
    if plan["accumulation"] > 1:
        each = f"{plan['accumulation']} x {each}"
    return [
        name,
        f"{plan['num_devices']} ({plan['topology']})",
        f"{plan['batch_size']}",
        each,
        f"{1e3 * step:.{0 if step >= 0.1 else 1}f}",
        f"{plan['estimated_mfu']:.3f}",
        f"{plan['hbm_peak_gib']:.1f} of {plan['hbm_capacity_gib']:.4g}",
        f"{plan['hbm_traffic_gb_per_clip']:.2f}",
        ", ".join(f"{100 * share:.0f}" for share in shares(plan).values()),
        f"{plan['estimated_days']:.2f}",
        f"{plan['batch_size'] / plan['num_hosts'] / step:.0f}",
        limit(plan),
    ]


def picture(plans: Sequence[Plan]) -> figure.Figure:
    """Memory, bytes of collectives and the time computed for each second of them, against chips: a
    line for each kind of chip, model and clips at once of which there are several sizes, or a point
    for each plan where there is no such line."""
    lines: dict[tuple, list[Plan]] = {}
    for plan in sorted(plans, key=lambda plan: plan["num_devices"]):
        flops = plan["model_flops_per_step"] / plan["batch_size"]
        kind = plan["topology"].partition(":")[0]
        key = kind, round(flops / 1e9), plan["micro_batch_per_device"], plan["codes"]
        lines.setdefault(key, []).append(plan)
    several = {
        key: some for key, some in lines.items() if len({p["num_devices"] for p in some}) > 1
    }
    lines = several or lines
    chips = sorted({plan["num_devices"] for some in lines.values() for plan in some})
    exchanged = lambda plan: sum(plan["collective_bytes"].values()) / plan["accumulation"] / GIB
    panels = {
        "Memory of a chip, GiB": lambda plan: plan["hbm_peak_gib"],
        "Collectives a micro-batch and chip, GiB": exchanged,
        "Computing for each second of collectives, s": lambda plan: (
            plan["estimated_step_time_s"] / plan["collective_bound_s"]
        ),
    }
    drawn = figure.Figure((17, 4.2), layout="constrained")
    for axes, (title, value) in zip(drawn.subplots(1, len(panels)), panels.items(), strict=True):
        for (kind, flops, clips, codes), some in lines.items():
            label = f"{kind}, {flops} GFLOP a clip, {clips:g} clips, codes {codes}"
            sizes = [plan["num_devices"] for plan in some]
            axes.plot(sizes, [value(plan) for plan in some], marker="o", label=label)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set(xlabel="chips", xscale="log", ylim=(0, None))
        axes.xaxis.set_major_locator(ticker.FixedLocator(chips))
        axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%d"))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.grid(color="#e8e8e8", lw=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    drawn.axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return drawn


if __name__ == "__main__":
    cli.run(main, FLAGS)
