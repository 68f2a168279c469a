"""A compiled step as the numbers of a plan: memory, bounds on its time, the compiler's estimate."""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from mert_jax.constants import SAMPLE_RATE
from mert_jax.hardware import GIB
from mert_jax.planning import hlo_cost
from mert_jax.planning.compile import Compiled, Topology

NOTE = (
    "estimated_*: the TPU compiler's static model (its cycles of every executed op over the clock, "
    "or the HBM traffic over the bandwidth where that is longer); collectives, loop overhead and "
    "Pallas kernels are left out, and a loop whose trips are null counts once; not a measurement. "
    "Bounds are from published peaks."
)
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
DAY = 86_400


def make_plan(config: ConfigDict, where: Topology, compiled: Compiled) -> dict[str, Any]:
    """What `plan` prints of one compiled step; what a CPU or a step that does not fit has not is
    None. Sizes are those of one device, times those of one update."""
    mesh, batch, chip = compiled.mesh, config.batch_size, where.chip
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    model_flops = 3 * batch * compiled.student.flops(config.data.num_samples)
    plan = {
        "topology": where.name,
        "num_devices": mesh.size,
        "num_hosts": where.hosts,
        "mesh": dict(mesh.shape),
        "batch_size": batch,
        "batch_hours": batch * config.data.num_samples / SAMPLE_RATE / 3600,
        "accumulation": config.accumulation,
        "clips_per_device": batch / shards,
        "micro_batch_per_device": batch / shards / config.accumulation,
        "remat": config.model.remat,
        "unroll": config.model.unroll,
        "codes": "stored" if compiled.batch["codes"] else "computed",
        **_memory(compiled, chip),
        "model_flops_per_step": model_flops,
    }
    found = summary(config, compiled)
    plan |= _costs(config, found, chip, mesh.size, model_flops)
    plan |= _input(compiled, where.hosts, plan["estimated_step_time_s"])
    plan |= _program(found, chip)
    return plan | {"compile_s": round(compiled.seconds, 1), "note": NOTE}


def summary(config: ConfigDict, compiled: Compiled) -> dict[str, Any] | None:
    """What the compiled step's HLO says, None where there is none."""
    if not compiled.text:
        return None
    frames = compiled.student.num_frames(config.data.num_samples)
    return hlo_cost.summary(compiled.text, frames, inside=ROOT)


def _memory(compiled: Compiled, chip: Any) -> dict[str, Any]:
    sizes = compiled.memory
    capacity = chip and chip.capacity
    parts = {"hbm_arguments_gib": None, "hbm_temporaries_gib": None}
    peak = compiled.used
    if sizes:
        parts = {
            "hbm_arguments_gib": sizes.argument_size_in_bytes / GIB,
            "hbm_temporaries_gib": sizes.temp_size_in_bytes / GIB,
        }
        results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        peak = (
            sizes.argument_size_in_bytes
            + sizes.temp_size_in_bytes
            + sizes.generated_code_size_in_bytes
            + results
        )
    return parts | {
        "hbm_peak_gib": peak / GIB,
        "hbm_capacity_gib": capacity and capacity / GIB,
        "fits": bool(sizes) and (capacity is None or peak <= capacity),
    }


def sent(kind: str, size: float, group: int) -> float:
    """Bytes that each of `group` devices sends in a collective on an array of `size` bytes, at
    least (rings: Patarasuk and Yuan, 2009, doi 10.1016/j.jpdc.2008.09.002)."""
    share = (group - 1) / group
    return size * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)


def _costs(
    config: ConfigDict, found: dict | None, chip: Any, devices: int, model_flops: float
) -> dict[str, Any]:
    names = (
        "flops_per_device collective_bytes hbm_traffic_gb_per_clip compute_bound_s memory_bound_s "
        "collective_bound_s step_time_lower_bound_s days_lower_bound estimated_step_time_s "
        "estimated_days estimated_mfu".split()
    )
    costs = dict.fromkeys(names)
    if not found:
        return costs
    collectives, over_links = Counter(), 0.0
    for c in found["collectives"]:
        collectives[c["kind"]] += c["bytes"] * c["times"]
        over_links += c["times"] * sent(c["kind"], c["bytes"], c["group"] or devices)
    clips = config.batch_size / devices
    costs |= {"flops_per_device": found["flops"], "collective_bytes": dict(collectives)}
    if not chip:
        return costs
    bounds = {
        "compute_bound_s": found["flops"] / chip.flops,
        "memory_bound_s": found["hbm_bytes"] / chip.bandwidth,
        "collective_bound_s": over_links / chip.links,
    }
    # what is computed, moved and sent can overlap: the longest of them is the bound
    lower = max(bounds.values())
    estimated = max(found["cycles"] / chip.clock, bounds["memory_bound_s"])
    return (
        costs
        | bounds
        | {
            "hbm_traffic_gb_per_clip": found["hbm_bytes"] / clips / 1e9,
            "step_time_lower_bound_s": lower,
            "days_lower_bound": lower * config.total_steps / DAY,
            "estimated_step_time_s": estimated,
            "estimated_days": estimated * config.total_steps / DAY,
            "estimated_mfu": model_flops / (devices * chip.flops * estimated),
        }
    )


def _input(compiled: Compiled, hosts: int, seconds: float | None) -> dict[str, Any]:
    """What the stream must deliver to each host: the batch's arrays, in the estimated time."""
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(compiled.batch)) / hosts / 1e6
    return {
        "input_mb_per_host": size,
        "input_mb_per_s_per_host": seconds and size / seconds,
    }


def _program(found: dict | None, chip: Any) -> dict[str, Any]:
    """What of the program costs most, and what should not be there."""
    names = """costliest_ops costliest_lines biggest_collectives square_fp32_tensors loops
        big_copies pallas_kernels"""
    if not found:
        return dict.fromkeys(names.split())
    return {
        "costliest_ops": _timed(found["costliest_ops"], chip),
        "costliest_lines": _timed(found["costliest_lines"], chip),
        "biggest_collectives": _biggest(found["collectives"]),
        "square_fp32_tensors": found["square_fp32"],
        "loops": found["loops"],
        "big_copies": found["big_copies"],
        "pallas_kernels": found["pallas_kernels"],
    }


def _biggest(collectives: Sequence[dict[str, Any]], top: int = 10) -> list[dict[str, Any]]:
    """The source lines that exchange most bytes, by kind of collective."""
    total = Counter()
    for c in collectives:
        total[c["kind"], c["source"] or "?"] += c["bytes"] * c["times"]
    return [
        {"kind": kind, "source": source, "bytes": size}
        for (kind, source), size in total.most_common(top)
    ]


def _timed(ops: Sequence[dict[str, Any]], chip: Any) -> list[dict[str, Any]]:
    return [op | {"ms": chip and round(1e3 * op["cycles"] / chip.clock, 3)} for op in ops]
