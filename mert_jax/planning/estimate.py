"""A compiled step as the figures of a plan: memory, bounds on its time, the compiler's estimate."""

from collections import Counter
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mert_jax.constants import SAMPLE_RATE
from mert_jax.hardware import GIB, Chip
from mert_jax.planning import hlo_cost
from mert_jax.planning.compilation import Compiled, Topology

NOTE = (
    "estimated_*: the TPU compiler's static model (its cycles of every executed op over the clock, "
    "or the HBM traffic over the bandwidth where that is longer); collectives, loop overhead and "
    "Pallas kernels are left out, and a loop whose trips are null counts once; not a measurement. "
    "Bounds are from published peaks."
)
CHECKOUT = f"{Path(__file__).parents[2]}/"
DAY = 86_400  # seconds
# in the order in which `plan` prints them
COSTS = (
    *("flops_per_device", "collective_bytes", "hbm_traffic_gb_per_clip", "compute_bound_s"),
    *("memory_bound_s", "collective_bound_s", "step_time_lower_bound_s", "days_lower_bound"),
    *("estimated_step_time_s", "estimated_days", "estimated_mfu"),
)
PROGRAM = ("costliest_ops", "loops", "big_copies", "pallas_kernels")


def make_plan(config: ConfigDict, topology: Topology, compiled: Compiled) -> dict[str, Any]:
    """Return what `plan` prints: sizes of a device, times of an update, None where unknown."""
    mesh, batch_size, chip = compiled.mesh, config.batch_size, topology.chip
    clips = batch_size / (mesh.shape["data"] * mesh.shape["fsdp"])
    num_samples = config.data.num_samples
    model_flops = 3 * batch_size * compiled.student.flops(num_samples)
    program, costs = dict.fromkeys(PROGRAM), dict.fromkeys(COSTS)
    if compiled.text:
        summary = hlo_cost.summary(compiled.text, inside=CHECKOUT)
        costs = estimate_costs(config, summary, chip, mesh.size, model_flops)
        for op in summary["costliest_ops"]:
            op["ms"] = chip and round(1e3 * op["cycles"] / chip.clock, 3)
        program = {name: summary[name] for name in PROGRAM}
    sizes, peak, capacity = compiled.memory, compiled.used, chip and chip.capacity
    if sizes:
        results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        peak = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes + results
        peak += sizes.generated_code_size_in_bytes
    num_hosts = len({device.process_index for device in topology.devices})
    arrays = jax.tree.leaves(compiled.batch)
    input_mb = sum(x.size * x.dtype.itemsize for x in arrays) / num_hosts / 1e6
    seconds = costs["estimated_step_time_s"]
    return {
        "topology": topology.name,
        "num_devices": mesh.size,
        "num_hosts": num_hosts,
        "mesh": dict(mesh.shape),
        "batch_size": batch_size,
        "batch_hours": batch_size * num_samples / SAMPLE_RATE / 3600,
        "accumulation": config.accumulation,
        "clips_per_device": clips,
        "micro_batch_per_device": clips / config.accumulation,
        "remat": config.model.remat,
        "unroll": config.model.unroll,
        "codes": "stored" if compiled.batch["codes"] else "computed",
        "hbm_arguments_gib": sizes and sizes.argument_size_in_bytes / GIB,
        "hbm_temporaries_gib": sizes and sizes.temp_size_in_bytes / GIB,
        "hbm_peak_gib": peak / GIB,
        "hbm_capacity_gib": capacity and capacity / GIB,
        "fits": bool(sizes) and (capacity is None or peak <= capacity),
        "model_flops_per_step": model_flops,
        **costs,
        "input_mb_per_host": input_mb,
        "input_mb_per_s_per_host": seconds and input_mb / seconds,
        **program,
        "compile_s": round(compiled.seconds, 1),
        "note": NOTE,
    }


def estimate_costs(
    config: ConfigDict, summary: dict[str, Any], chip: Chip | None, devices: int, model_flops: float
) -> dict[str, Any]:
    """Return COSTS from an `hlo_cost.summary`, None for those that a CPU lacks."""
    moved, over_links = Counter(), 0.0
    for row in summary["collectives"]:
        kind, size, group = row["kind"], row["bytes"], row["group"] or devices
        share = (group - 1) / group  # of a ring: Patarasuk and Yuan, doi 10.1016/j.jpdc.2008.09.002
        sent = size * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
        moved[kind] += size * row["times"]
        over_links += row["times"] * sent
    known = {"flops_per_device": summary["flops"], "collective_bytes": dict(moved)}
    if chip:
        known |= {
            "hbm_traffic_gb_per_clip": summary["hbm_bytes"] / (config.batch_size / devices) / 1e9,
            "compute_bound_s": summary["flops"] / chip.flops,
            "memory_bound_s": summary["hbm_bytes"] / chip.bandwidth,
            "collective_bound_s": over_links / chip.links,
        }
        # computing, memory traffic and collectives may overlap
        lower = max(value for name, value in known.items() if name.endswith("_bound_s"))
        estimated = max(summary["cycles"] / chip.clock, known["memory_bound_s"])
        known |= {
            "step_time_lower_bound_s": lower,
            "days_lower_bound": lower * config.total_steps / DAY,
            "estimated_step_time_s": estimated,
            "estimated_days": estimated * config.total_steps / DAY,
            "estimated_mfu": model_flops / (devices * chip.flops * estimated),
        }
    return dict.fromkeys(COSTS) | known
