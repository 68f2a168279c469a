"""Plans: real ones for fake CPU devices and, where its compiler is installed, for a TPU."""

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
from mert_jax.planning import abstract_teachers, estimate, search
from mert_jax.planning import compile as compiling
from mert_jax.pretraining import build
from tests import small

KEYS = """topology num_devices mesh batch_size batch_hours accumulation clips_per_device
    hbm_arguments_gib hbm_temporaries_gib hbm_peak_gib hbm_capacity_gib fits flops_per_device
    model_flops_per_step collective_bytes compute_bound_s memory_bound_s step_time_lower_bound_s
    days_lower_bound estimated_step_time_s estimated_mfu hbm_traffic_gb_per_clip costliest_ops
    square_fp32_tensors loops big_copies input_mb_per_s_per_host compile_s note""".split()


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
        (["--topology=v5e"], "such as v5e:4x4"),
        ([], "--topology=NAME is needed"),
        (["--topology=cpu:4", "--config.mesh.tensor=3"], "does not make 4 devices"),
        (["--topology=cpu:3"], "micro-batches of 8 clips"),
        (["--topology=cpu:4", "--config.accumulation=3"], "does not split into accumulation=3"),
        (["--topology=cpu:4", "--codes=stored"], "none is rvq_vae"),
        (["--topology=cpu:4", "--hlo=/nowhere/step.txt"], "--hlo=/nowhere/step.txt cannot be"),
    ],
    ids="kind shape none mesh batch accumulation codes hlo".split(),
)
def test_a_mistake_is_one_line(flags, words):
    done = command(*flags)
    assert done.returncode == 2
    assert done.stdout == ""
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_without_the_compiler_it_says_which_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e \.\[plan\]"):
        compiling.make_topology("v5e:2x2")


def test_codes_can_be_computed_on_many_devices():
    """The codec's recurrent layers begin with zeros, which are the same on all of them."""
    config = small.config(teachers=("rvq_vae",))
    made = abstract_teachers.make(config, {})
    objective = build.objective(config, build.student(config, made), made)
    wave = jax.ShapeDtypeStruct((8, 16_000), jnp.float32)
    with jax.set_mesh(sharding.make_mesh(-1, 1, 1)):
        hear = jax.jit(objective.teachers["rvq_vae"])
        assert hear.lower(made["rvq_vae"].params, wave).out_info.shape[::2] == (8, 8)


@pytest.fixture(scope="module")
def with_stored_codes():
    """A plan of the student alone: codes come with the batch, and nothing is computed for them."""
    config = small.config(teachers=("rvq_vae",), model__num_layers=4)
    where = compiling.Topology("cpu:8", jax.devices(), None)
    return config, where, compiling.compile_step(config, where.devices, "stored")


def test_flops_are_those_of_the_model_loops_included(with_stored_codes):
    config, where, compiled = with_stored_codes
    plan = estimate.make_plan(config, where, compiled)
    assert plan["codes"] == "stored"
    assert 4 in [loop["trips"] for loop in plan["loops"]]
    # three passes: convolution 0 has no gradient by the wave, but is computed again
    assert plan["flops_per_device"] * 8 == pytest.approx(plan["model_flops_per_step"], rel=0.03)


def test_the_batch_is_what_the_stream_delivers(with_stored_codes):
    config, where, compiled = with_stored_codes
    frames = -(-config.data.num_samples // HOP_LENGTH)
    assert compiled.batch["audio"].shape == (8, 16_000)
    assert compiled.batch["codes"]["rvq_vae"].shape == (8, frames, 8)
    size = 2 * 8 * 16_000 + 8 + 2 * 4 * 8 + 4 * 8 + 2 * 8 * frames * 8
    assert estimate.make_plan(config, where, compiled)["input_mb_per_host"] == size / 1e6


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


def made_up(**costs):
    """A compiled step of eight v5e chips whose text is replaced by `costs`."""
    found = dict(cycles=0, flops=0.0, hbm_bytes=0, collectives=[], loops=[], costliest_ops=[],
                 costliest_lines=[], big_copies=[], square_fp32=[], pallas_kernels=0)  # fmt: skip
    return estimate._costs(
        SimpleNamespace(batch_size=128, total_steps=86_400),
        found | costs,
        hardware.TPUS["v5e"],
        devices=8,
        model_flops=8 * 197e12 * 0.01,
    )


def test_bounds_and_estimates():
    reduce = dict(kind="all-reduce", bytes=100e6, group=8, times=2, source="model.py:1")
    found = made_up(cycles=30e6, flops=197e10, hbm_bytes=819e7, collectives=[reduce])
    assert found["compute_bound_s"] == pytest.approx(0.01)
    assert found["memory_bound_s"] == pytest.approx(0.01)
    assert found["collective_bound_s"] == pytest.approx(2 * 2 * 7 / 8 * 100e6 / 200e9)
    assert found["step_time_lower_bound_s"] == pytest.approx(0.01)
    assert found["days_lower_bound"] == pytest.approx(0.01)
    assert found["estimated_step_time_s"] == pytest.approx(0.02)  # 30 M cycles at 1.5 GHz
    assert found["estimated_mfu"] == pytest.approx(0.5)
    assert found["hbm_traffic_gb_per_clip"] == pytest.approx(8.19 / 16)
    assert found["collective_bytes"] == {"all-reduce": 200e6}
    # where memory is slower than the sum of the cycles, it counts
    assert made_up(cycles=30e6, hbm_bytes=819e9)["estimated_step_time_s"] == pytest.approx(1.0)


def test_the_biggest_collectives_are_sums_by_line():
    moved = [
        ("all-reduce", 3, 2, "a.py:1"),
        ("all-reduce", 5, 1, "a.py:1"),
        ("all-gather", 9, 1, ""),
    ]
    found = [dict(kind=k, bytes=size, times=n, source=line) for k, size, n, line in moved]
    assert estimate._biggest(found) == [
        dict(kind="all-reduce", source="a.py:1", bytes=11),
        dict(kind="all-gather", source="?", bytes=9),
    ]


@pytest.mark.parametrize(
    ("error", "size"),
    [
        ("required for HLO temporaries (128.00G) exceeds available HBM (15.75G). HLO", 128 * 2**30),
        ("Ran out of memory in memory space hbm. Used 512.0M of 15.75G hbm.", 2**29),
        ("INTERNAL: something else (3.0G)", 0),
    ],
)
def test_what_does_not_fit(error, size):
    assert compiling._used_hbm(error) == size


def test_chips_by_the_names_that_jax_has_for_them():
    kinds = {"TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12}
    for kind, flops in kinds.items():
        assert hardware.peak_flops(kind) == flops
    assert hardware.peak_flops("cpu") is None
    for chip in hardware.TPUS.values():  # a clock at which the matrix units reach the peak
        units = chip.flops / chip.clock / 2
        assert round(units / 2**16) == pytest.approx(units / 2**16, rel=0.01)


def test_a_search_ranks_what_fits_and_stops_at_the_best_of_each_stage(capsys):
    config = small.config(batch_size=64)
    start = search.Setting(8, 1, 1, "none", 1, 1)
    tried = []

    def plan(setting):
        tried.append(setting)
        if setting.tensor == 4:
            raise UserError("heads cannot be split so")
        clips = 64 // setting.accumulation
        return {
            "fits": clips <= 32 or setting.remat == "full",
            "hbm_peak_gib": clips,
            # of the meshes (2 ways of `tensor`) is best, then no recomputation, then unrolling
            "estimated_step_time_s": 8
            - setting.tensor
            + (setting.remat != "none")
            - setting.unroll,
            "collective_bound_s": setting.fsdp,
        }

    found = search.search(start, search.variants(config, 8), plan)
    best, _ = found[0]
    assert best == search.Setting(4, 1, 2, "none", 2, 2)
    assert len(tried) == len(set(tried)) == len(found) + 1
    assert [p["fits"] for _, p in found] == sorted((p["fits"] for _, p in found), reverse=True)
    said = capsys.readouterr().err
    assert "eta" in said
    assert "heads cannot be split so" in said


def test_a_search_goes_on_from_a_setting_that_cannot_be():
    def plan(setting):
        if setting.accumulation != 4:
            raise UserError(f"accumulation {setting.accumulation} cannot be")
        return dict(fits=True, hbm_peak_gib=1, estimated_step_time_s=1, collective_bound_s=0)

    stages = search.variants(small.config(batch_size=64), 8)
    (best, _), *_ = search.search(search.Setting(8, 1, 1, "none", 1, 1), stages, plan)
    assert best.accumulation == 4
    with pytest.raises(UserError, match="accumulation 1 cannot be"):
        search.search(search.Setting(8, 1, 1, "none", 1, 1), [], plan)


def test_time_between_devices_counts_in_a_search():
    plan = lambda time, moved, fits=True: {
        "fits": fits, "hbm_peak_gib": 9, "estimated_step_time_s": time, "collective_bound_s": moved
    }  # fmt: skip
    plans = [plan(2, 1), plan(1, 3), plan(1, 0, fits=False), plan(None, None, fits=False)]
    assert sorted(plans, key=search.rank) == plans
    assert search.rank(plan(None, None)) < search.rank(plans[2])


def test_a_setting_changes_the_config_it_is_of():
    config = small.config()
    changed = search.Setting(2, 4, 1, "full", 4, 2).of(config)
    assert dict(changed.mesh) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert (changed.model.remat, changed.model.unroll, changed.accumulation) == ("full", 2, 4)
    assert config.model.remat == "none"
    assert search.first(changed, dict(changed.mesh)).of(config) == changed


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
