"""Plans side by side: a Markdown table, and a picture of their growth with the number of chips."""

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import figure

from mert_jax.errors import UserError
from mert_jax.files import atomic_write
from mert_jax.hardware import GIB

Plan = dict[str, Any]
PANELS = (
    "Memory of a chip, GiB",
    "Collectives a micro-batch and chip, GiB",
    "Computing for each second of collectives, s",
)


def print_table(patterns: Sequence[str], picture: str | None = None) -> None:
    """Print the table of the plans that the patterns match, and draw them into `picture`."""
    plans = read_plans(patterns)
    print("\n".join(table(plans)), flush=True)
    if picture:
        with atomic_write(picture, replace=True) as path:
            draw([plan for _, plan in plans]).savefig(path, format="png", dpi=130)


def read_plans(patterns: Sequence[str]) -> list[tuple[str, Plan]]:
    """Return the names and plans of files. Raises UserError for what is not a plan of a TPU."""
    plans = []
    for pattern in patterns:
        paths = sorted(glob.glob(pattern))
        if not paths:
            raise UserError(f"--plans={pattern} matches no file; give the output of mert_jax.plan")
        for path in map(Path, paths):
            try:
                plan = json.loads(path.read_text())
                busy_shares(plan)
            except (OSError, ValueError, TypeError, KeyError) as e:
                how = "python -m mert_jax.plan --topology=v5e:2x4 ... > FILE"
                raise UserError(f"{path} is not a plan of a TPU ({e!r}); make one: {how}") from e
            plans.append((path.name.removesuffix(".json"), plan))
    return plans


def busy_shares(plan: Plan) -> dict[str, float]:
    """Return the least share of the estimated step for which each part of a chip is busy."""
    parts = {"matrix units": "compute", "memory traffic": "memory", "links": "collective"}
    step = plan["estimated_step_time_s"]
    return {part: plan[f"{bound}_bound_s"] / step for part, bound in parts.items()}


def limit(plan: Plan) -> str:
    """Return the part of a chip that limits the step; vector units if none is half busy."""
    if plan["hbm_peak_gib"] > 0.9 * plan["hbm_capacity_gib"]:
        return "memory"
    shares = busy_shares(plan)
    busiest = max(shares, key=shares.get)
    return busiest if shares[busiest] > 0.5 else "vector units"


def table(plans: Sequence[tuple[str, Plan]]) -> list[str]:
    """Return the lines of a Markdown table, one row a plan."""
    rows = [table_row(name, plan) for name, plan in plans]
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def table_row(name: str, plan: Plan) -> dict[str, str]:
    """Return the cells of a plan by their headings."""
    step = plan["estimated_step_time_s"]
    accumulation = f"{plan['accumulation']} x " if plan["accumulation"] > 1 else ""
    shares = (f"{100 * share:.0f}" for share in busy_shares(plan).values())
    return {
        "plan": name,
        "chips": f"{plan['num_devices']} ({plan['topology']})",
        "clips an update": f"{plan['batch_size']}",
        "a chip": f"{accumulation}{plan['micro_batch_per_device']:g}",
        "step, ms": f"{1e3 * step:.{0 if step >= 0.1 else 1}f}",
        "MFU": f"{plan['estimated_mfu']:.3f}",
        "memory, GiB": f"{plan['hbm_peak_gib']:.1f} of {plan['hbm_capacity_gib']:.4g}",
        "traffic a clip, GB": f"{plan['hbm_traffic_gb_per_clip']:.2f}",
        "matrix units, memory and links busy, %": ", ".join(shares),
        "run, days": f"{plan['estimated_days']:.2f}",
        "clips/s a host": f"{plan['batch_size'] / plan['num_hosts'] / step:.0f}",
        "limit": limit(plan),
    }


def draw(plans: Sequence[Plan]) -> figure.Figure:
    """Draw PANELS against the number of chips, a line for each kind of chip, model, micro-batch.

    Kinds with a single number of chips are drawn, as points, only if no kind has several.
    """
    lines: dict[str, list[tuple[float, ...]]] = {}
    for plan in sorted(plans, key=lambda plan: plan["num_devices"]):
        kind = plan["topology"].partition(":")[0]
        flops = round(plan["model_flops_per_step"] / plan["batch_size"] / 1e9)
        clips = f"{plan['micro_batch_per_device']:g} clips"
        label = f"{kind}, {flops} GFLOP a clip, {clips}, codes {plan['codes']}"
        collectives = sum(plan["collective_bytes"].values()) / plan["accumulation"] / GIB
        computing = plan["estimated_step_time_s"] / plan["collective_bound_s"]
        point = plan["num_devices"], plan["hbm_peak_gib"], collectives, computing
        lines.setdefault(label, []).append(point)
    lines = {key: line for key, line in lines.items() if line[0][0] < line[-1][0]} or lines
    chips = sorted({point[0] for line in lines.values() for point in line})
    picture = figure.Figure((17, 4.2), layout="constrained")
    for i, (axes, title) in enumerate(zip(picture.subplots(1, 3), PANELS, strict=True), 1):
        for label, line in lines.items():
            axes.plot([p[0] for p in line], [p[i] for p in line], marker="o", label=label)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set(xlabel="chips", xscale="log", ylim=(0, None))
        axes.set_xticks(chips, map(str, chips))
        axes.set_xticks([], minor=True)
        axes.grid(color="#e8e8e8", lw=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    picture.axes[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return picture
