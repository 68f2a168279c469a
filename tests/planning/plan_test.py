"""Plans for fake CPU devices and, if the TPU compiler is installed, for a TPU."""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from mert_jax import hardware, sharding
from mert_jax.constants import HOP_LENGTH
from mert_jax.errors import UserError
from mert_jax.planning import abstract_teachers, compilation, estimate
from mert_jax.planning.plan import SEARCH_KEYS, Setting, make_plan, make_stages, rank, search
from mert_jax.pretraining import build
from tests import small
from tests.runs import slow

KEYS = """topology num_devices mesh batch_size batch_hours accumulation clips_per_device
    hbm_arguments_gib hbm_temporaries_gib hbm_peak_gib hbm_capacity_gib fits flops_per_device
    model_flops_per_step collective_bytes compute_bound_s memory_bound_s step_time_lower_bound_s
    days_lower_bound estimated_step_time_s estimated_mfu hbm_traffic_gb_per_clip costliest_ops
    loops big_copies input_mb_per_s_per_host compile_s note""".split()
START = Setting(data=8, fsdp=1, tensor=1, remat="none", accumulation=1, unroll=1)


def command(*args: str) -> subprocess.CompletedProcess:
    flags = ["--config=configs/tiny.py", *small.command_line(), *args]
    return subprocess.run(
        [sys.executable, "-m", "mert_jax.plan", *flags], capture_output=True, text=True
    )


def test_the_command_prints_one_json():
    done = command("--topology=cpu:4", "--config.teachers=('random_projection',)")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert set(KEYS) <= set(plan)
    assert plan["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    assert (plan["num_devices"], plan["clips_per_device"], plan["fits"]) == (4, 2, True)
    assert plan["batch_hours"] == pytest.approx(8 * 16_000 / 24_000 / 3600, rel=1e-5)
    assert plan["hbm_peak_gib"] > plan["hbm_arguments_gib"] > 0
    assert plan["collective_bytes"]["all-reduce"] > 0
    # a CPU has none of these
    for key in ("hbm_capacity_gib", "estimated_mfu", "days_lower_bound", "hbm_traffic_gb_per_clip"):
        assert plan[key] is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--topology=v9:2x2"], "'v9:2x2' is unknown; it is v4, v5e, v5p, v6e"),
        (["--topology=cpu:3"], "micro-batches of 8 clips"),
        *slow(
            (["--topology=v5e"], "such as v5e:4x4"),
            ([], "--topology=NAME is needed"),
            (["--topology=cpu:4", "--config.mesh.tensor=3"], "does not make 4 devices"),
            (["--topology=cpu:4", "--config.accumulation=3"], "does not split into accumulation=3"),
            (["--topology=cpu:4", "--codes=stored"], "none is rvq_vae"),
            (["--topology=cpu:4", "--hlo=/nowhere/step.txt"], "--hlo=/nowhere/step.txt cannot be"),
        ),
    ],
)
def test_a_mistake_is_one_line(flags, words):
    done = command(*flags)
    assert done.returncode == 2
    assert done.stdout == ""
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_without_the_compiler_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e \.\[plan\]"):
        compilation.make_topology("v5e:2x2")


def test_codes_can_be_computed_on_many_devices():
    """The codec's recurrent layers begin with zeros, which are the same on all devices."""
    config = small.config(teachers=("rvq_vae",))
    teachers = abstract_teachers.make(config, {})
    objective = build.make_objective(config, build.make_student(config, teachers), teachers)
    wave = jax.ShapeDtypeStruct((8, 16_000), jnp.float32)
    with jax.set_mesh(sharding.make_mesh(-1, 1, 1)):
        teacher = jax.jit(objective.teachers["rvq_vae"])
        assert teacher.lower(teachers["rvq_vae"].params, wave).out_info.shape[::2] == (8, 8)


@pytest.fixture(scope="module")
def stored_codes_step():
    """The step of a student whose codes come with the batch, with the config and the plan."""
    config = small.config(teachers=("rvq_vae",), model__num_layers=4)
    topology = compilation.Topology("cpu:8", jax.devices(), None)
    compiled = compilation.compile_step(config, topology.devices, "stored")
    return config, compiled, estimate.make_plan(config, topology, compiled)


def test_flops_are_those_of_the_model_loops_included(stored_codes_step):
    _, _, plan = stored_codes_step
    assert plan["codes"] == "stored"
    assert 4 in [loop["trips"] for loop in plan["loops"]]
    # three passes: convolution 0 has no gradient by the wave, but is computed again
    assert plan["flops_per_device"] * 8 == pytest.approx(plan["model_flops_per_step"], rel=0.03)


def test_the_batch_is_the_one_that_the_loader_delivers(stored_codes_step):
    config, compiled, plan = stored_codes_step
    frames = -(-config.data.num_samples // HOP_LENGTH)
    assert compiled.batch["audio"].shape == (8, 16_000)
    assert compiled.batch["codes"]["rvq_vae"].shape == (8, frames, 8)
    size = 2 * 8 * 16_000 + 8 + 2 * 4 * 8 + 4 * 8 + 2 * 8 * frames * 8
    assert plan["input_mb_per_host"] == size / 1e6


@pytest.mark.parametrize("name", ["rvq_vae", "kmeans", "mel_rvq"])
def test_a_teacher_without_a_checkpoint_is_its_shapes(name):
    config = small.config(teachers=(name,))
    (teacher,) = abstract_teachers.make(config, {}).values()
    wave = jax.ShapeDtypeStruct((2, 16_000), "float32")
    codes = jax.eval_shape(teacher.apply, teacher.params, wave)
    books = {"rvq_vae": 8, "kmeans": 2, "mel_rvq": 8}[name]
    assert codes.shape[0::2] == (2, books)
    assert codes.shape[1] in (50, 51)
    assert teacher.size == {"kmeans": 300}.get(name, 1024)


def costs_on_v5e(**figures):
    """Estimate the costs on eight v5e chips of a step with these figures."""
    summary = dict(cycles=0, flops=0.0, hbm_bytes=0, collectives=[]) | figures
    config = SimpleNamespace(batch_size=128, total_steps=86_400)
    model_flops = 8 * 197e12 * 0.01
    return estimate.estimate_costs(config, summary, hardware.TPUS["v5e"], 8, model_flops)


def test_bounds_and_estimates():
    reduce = dict(kind="all-reduce", bytes=100e6, group=8, times=2, source="model.py:1")
    costs = costs_on_v5e(cycles=30e6, flops=197e10, hbm_bytes=819e7, collectives=[reduce])
    assert costs.pop("collective_bytes") == {"all-reduce": 200e6}
    assert costs == pytest.approx(
        {
            "flops_per_device": 197e10,
            "compute_bound_s": 0.01,
            "memory_bound_s": 0.01,
            "collective_bound_s": 2 * 2 * 7 / 8 * 100e6 / 200e9,
            "step_time_lower_bound_s": 0.01,
            "days_lower_bound": 0.01,
            "estimated_step_time_s": 0.02,  # 30 M cycles at 1.5 GHz
            "estimated_days": 0.02,
            "estimated_mfu": 0.5,
            "hbm_traffic_gb_per_clip": 8.19 / 16,
        }
    )
    # memory traffic counts if it takes longer than the cycles
    costs = costs_on_v5e(cycles=30e6, hbm_bytes=819e9)
    assert costs["estimated_step_time_s"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("error", "size"),
    [
        ("required for HLO temporaries (128.00G) exceeds available HBM (15.75G). HLO", 128 * 2**30),
        ("Ran out of memory in memory space hbm. Used 512.0M of 15.75G hbm.", 2**29),
        ("INTERNAL: something else (3.0G)", 0),
    ],
)
def test_the_memory_of_a_step_that_does_not_fit(error, size):
    assert compilation._used_hbm(error) == size


def test_chips_by_the_names_that_jax_has_for_them():
    kinds = {"TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12}
    for kind, flops in kinds.items():
        assert hardware.peak_flops(kind) == flops
    assert hardware.peak_flops("cpu") is None
    for chip in hardware.TPUS.values():  # a clock at which the matrix units reach the peak
        units = chip.flops / chip.clock / 2
        assert round(units / 2**16) == pytest.approx(units / 2**16, rel=0.01)


def test_a_search_ranks_plans_and_follows_the_best_of_each_stage(capsys):
    tried = []

    def plan(setting):
        tried.append(setting)
        if setting.tensor == 4:
            raise UserError("heads cannot be split so")
        clips = 64 // setting.accumulation
        # the best: 2 ways of `tensor`, no recomputation, unrolled layers
        time = 8 - setting.tensor + (setting.remat != "none") - setting.unroll
        return {
            "fits": clips <= 32 or setting.remat == "full",
            "hbm_peak_gib": clips,
            "estimated_step_time_s": time,
            "collective_bound_s": setting.fsdp,
        }

    ranked = search(START, make_stages(small.config(batch_size=64), 8), plan)
    assert ranked[0][0] == Setting(4, 1, 2, "none", 2, 2)
    assert len(tried) == len(set(tried)) == len(ranked) + 1
    assert [p["fits"] for _, p in ranked] == sorted((p["fits"] for _, p in ranked), reverse=True)
    printed = capsys.readouterr().err
    assert "stage 4 of 4" in printed
    assert "heads cannot be split so" in printed


def test_a_search_starts_from_a_setting_that_is_impossible():
    def plan(setting):
        if setting.accumulation != 4:
            raise UserError(f"accumulation {setting.accumulation} cannot be")
        return dict(fits=True, hbm_peak_gib=1, estimated_step_time_s=1, collective_bound_s=0)

    (best, _), *_ = search(START, make_stages(small.config(batch_size=64), 8), plan)
    assert best.accumulation == 4
    with pytest.raises(UserError, match="accumulation 1 cannot be"):
        search(START, [], plan)


def test_time_between_devices_counts_in_a_search():
    names = ("fits", "estimated_step_time_s", "collective_bound_s")
    figures = [(True, 2, 1), (True, 1, 3), (False, 1, 0), (False, None, None)]
    plans = [dict(zip(names, row, strict=True), hbm_peak_gib=9) for row in figures]
    assert sorted(plans, key=rank) == plans
    assert rank(plans[3] | {"fits": True}) < rank(plans[2])  # on a CPU, times are unknown


def test_a_setting_changes_only_its_copy_of_the_config():
    config = small.config()
    changed = Setting(2, 4, 1, "full", 4, 2).apply(config)
    assert dict(changed.mesh) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert (changed.model.remat, changed.model.unroll, changed.accumulation) == ("full", 2, 4)
    assert config.model.remat == "none"


def test_a_search_begins_with_the_settings_of_the_config(monkeypatch):
    topology = compilation.Topology("cpu:8", jax.devices(), None)
    monkeypatch.setattr(compilation, "make_topology", lambda name: topology)
    monkeypatch.setattr(compilation, "compile_step", lambda config, devices, codes: None)
    configs = []

    def make(config, topology, compiled):
        configs.append(config)
        return dict.fromkeys(SEARCH_KEYS) | {"fits": False, "hbm_peak_gib": len(configs)}

    monkeypatch.setattr(estimate, "make_plan", make)
    config = Setting(2, 2, 2, "full", 2, 2).apply(small.config(batch_size=16))
    plan = make_plan(config, "cpu:8", search_settings=True)
    assert configs[0] == config
    assert plan["hbm_peak_gib"] == 1  # the least memory
    assert [row["hbm_peak_gib"] for row in plan["search"]] == list(range(1, len(configs) + 1))
    assert plan["search"][0].items() >= {"data": 2, "remat": "full", "accumulation": 2}.items()


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler, the extra [plan] or [peers]",
)
def test_a_plan_for_a_tpu():
    done = command("--topology=v5e:2x4", "--config.teachers=('random_projection',)")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (plan["num_devices"], plan["num_hosts"], plan["hbm_capacity_gib"]) == (8, 1, 15.75)
    assert plan["fits"]
    assert 0 < plan["estimated_mfu"] < 1
    assert plan["estimated_step_time_s"] >= plan["step_time_lower_bound_s"] > 0
    assert plan["costliest_ops"][0]["source"].startswith("mert_jax/")
    assert all(loop["trips"] for loop in plan["loops"])
    assert plan["flops_per_device"] * 8 > 0.9 * plan["model_flops_per_step"]
