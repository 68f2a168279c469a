"""Conversion between checkpoint formats: every direction, full-size models, and failures."""

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
from safetensors import safe_open

from mert_jax.checkpoints import fairseq, formats, in_memory, stablehlo, tensor_names
from mert_jax.checkpoints.formats import read_checkpoint
from mert_jax.errors import UserError
from mert_jax.tensors import state_dict, torch_pickle
from tests import checkpoint_samples
from tests.checkpoint_samples import FLAVOURS, GOLDEN, hf_folder, hf_state, hf_student, student


@pytest.fixture(scope="module", params=FLAVOURS)
def sources(request, tmp_path_factory):
    """A student's fairseq file after fp16 training, its HF directory, and both as runs of ours."""
    folder, options = tmp_path_factory.mktemp("sources"), FLAVOURS[request.param]
    model = student(**options)
    state = checkpoint_samples.official_state(model, np.float16)
    last = checkpoint_samples.moments(state, flat=True)
    content = checkpoint_samples.content(model, state, last_optimizer_state=last)
    torch_pickle.write_pickle(folder / "x.pt", content)
    headless = hf_student(**options)
    hf_folder(folder / "hf", headless, hf_state(headless, np.float16))
    (folder / "hf" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    formats.convert(str(folder / "x.pt"), str(folder / "run"), "orbax")
    formats.convert(str(folder / "hf"), str(folder / "run_of_hf"), "orbax")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A Hugging Face directory of the 95M flavour."""
    return hf_folder(tmp_path_factory.mktemp("small") / "hf", hf_student(), hf_state(hf_student()))


# every direction ---------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["x.pt", "run"])
def test_fairseq_to_ours_to_fairseq(sources, tmp_path, source, capsys):
    formats.convert(str(sources / source), str(tmp_path / "back.pt"), "fairseq")
    before, after = (
        torch_pickle.read_pickle(path) for path in (sources / "x.pt", tmp_path / "back.pt")
    )
    checkpoint_samples.same_state(after["model"], before["model"])
    moments = after["last_optimizer_state"]["state"]
    checkpoint_samples.assert_same(moments, before["last_optimizer_state"]["state"])
    assert after["optimizer_history"][-1]["num_updates"] == 7
    printed = capsys.readouterr().out
    assert "parameters in float16, heads: rvq_vae, cqt; 7 updates, with Adam's moments" in printed
    assert "licence: not stated (--license=NAME sets it)" in printed
    assert f"wrote {tmp_path / 'back.pt'} (0 MiB)" in printed


@pytest.mark.parametrize("source", ["hf", "run_of_hf"])
def test_hugging_face_to_ours_to_hugging_face(sources, tmp_path, source):
    formats.convert(str(sources / source), str(tmp_path / "back"), "hf")
    before, after = (
        state_dict.read_tensor_folder(path) for path in (sources / "hf", tmp_path / "back")
    )
    checkpoint_samples.same_state({name: after[name] for name in before}, before)
    assert after.keys() == before.keys()
    assert read_checkpoint(tmp_path / "back").about.licence == "cc-by-nc-4.0"


@pytest.mark.parametrize("source", ["x.pt", "run"])
def test_fairseq_to_hugging_face(sources, tmp_path, source):
    formats.convert(str(sources / source), str(tmp_path / "hf"), "hf")
    assert_official_mapping(sources / "x.pt", tmp_path / "hf", "95m")


def assert_official_mapping(file, folder, size: str) -> None:
    """Assert that `folder` has the tensors of the fairseq `file`, bit for bit, in the names of
    the official converter."""
    listed = json.loads((GOLDEN / f"shapes_student_{size}.json").read_text())
    mapping = listed["converter_mapping_fairseq_to_hf_oldnames"]
    left_out = set(listed["converter_unused_or_skipped"])
    # the official mapping is of more layers than a small student has
    expected = {
        mapping.get(name, name.replace(".layers.2.", ".layers.1.")): x
        for name, x in torch_pickle.read_pickle(file)["model"].items()
        if name not in left_out
    }
    state = state_dict.read_tensor_folder(folder)
    assert state.keys() == expected.keys()
    checkpoint_samples.same_state({name: state[name] for name in expected}, expected)


def test_a_directory_without_heads_makes_no_fairseq_file(small, tmp_path):
    with pytest.raises(UserError, match="this has: none"):
        formats.convert(small, str(tmp_path / "x.pt"), "fairseq")
    assert os.listdir(tmp_path) == []


def test_moments_and_licence_are_as_asked(sources, tmp_path):
    formats.convert(str(sources / "x.pt"), str(tmp_path / "run"), "orbax", "mit", moments=False)
    checkpoint = read_checkpoint(tmp_path / "run")
    assert (checkpoint.moments, checkpoint.step, checkpoint.about.licence) == (None, 7, "mit")
    formats.convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf")
    text = (tmp_path / "hf" / "README.md").read_text()
    assert "license: mit" in text
    assert "Goes back to x.pt (fairseq); run (step 7)." in text
    assert "7 updates." in text


# StableHLO ---------------------------------------------------------------------------------------

ELSEWHERE = """
import json, sys
sys.modules["mert_jax"] = sys.modules["flax"] = None  # not to be imported
import jax, numpy as np
from jax import export
from safetensors.numpy import load_file

folder, out = sys.argv[1:]
params = {}
for name, x in load_file(f"{folder}/params.safetensors").items():
    *path, leaf = name.split("/")
    at = params
    for part in path:
        at = at.setdefault(part, {})
    at[leaf] = x
with open(f"{folder}/model.stablehlo", "rb") as f:
    call = jax.jit(export.deserialize(bytearray(f.read())).call)
wave = np.random.default_rng(5).normal(0, 0.1, (3, 777)).astype(np.float32)
np.save(out, call(params, wave))
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A pre-norm student with heads as StableHLO, and its checkpoint."""
    folder = tmp_path_factory.mktemp("program")
    model = student(**FLAVOURS["330m"])
    params = jax.tree.map(lambda x: 0.3 * x, checkpoint_samples.params_of(model))
    checkpoint = in_memory.Checkpoint(model, params, None, 0, in_memory.About())
    stablehlo.write_checkpoint(str(folder), checkpoint)
    return folder, checkpoint


def test_the_program_runs_any_batch_and_length(program):
    folder, checkpoint = program
    call, params = stablehlo.load(folder)
    forward = jax.jit(stablehlo.hidden_states, static_argnums=0)
    for shape in ((1, checkpoint.student.receptive_field), (5, 2_001)):
        wave = np.random.default_rng(1).normal(0, 0.1, shape).astype(np.float32)
        expected = forward(checkpoint.student, checkpoint.params, wave)
        states = np.asarray(call(params, wave))
        assert states.shape == expected.shape
        assert states.shape[:2] == (checkpoint.student.num_layers + 1, shape[0])
        np.testing.assert_allclose(states, expected, atol=1e-4)
    with pytest.raises(ValueError, match="n"):
        call(params, np.zeros((1, checkpoint.student.receptive_field - 1), np.float32))
    signature = json.loads((folder / "signature.json").read_text())
    assert signature["platforms"] == ["cpu", "cuda", "tpu"]
    assert in_memory.student_of(signature["student"]) == checkpoint.student.clone(heads=())
    assert not [
        name for name in state_dict.read_tensors(folder / "params.safetensors") if "rvq" in name
    ]


def test_the_program_runs_without_this_package(program, tmp_path):
    folder, checkpoint = program
    (tmp_path / "elsewhere.py").write_text(textwrap.dedent(ELSEWHERE))
    done = subprocess.run(
        [sys.executable, "-I", "elsewhere.py", folder, "out.npy"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    wave = np.random.default_rng(5).normal(0, 0.1, (3, 777)).astype(np.float32)
    expected = jax.jit(stablehlo.hidden_states, static_argnums=0)(
        checkpoint.student, checkpoint.params, wave
    )
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-4)


def test_a_program_that_computes_nan_fails_its_check(program, monkeypatch):
    folder, checkpoint = program
    monkeypatch.setattr(stablehlo, "load", lambda path: (lambda *_: np.float32(np.nan), None))
    with pytest.raises(UserError, match="differs from the student by nan"):
        stablehlo.check_program(str(folder), checkpoint)


def test_a_program_that_computes_something_else_is_not_written(small, tmp_path, monkeypatch):
    write = state_dict.write_tensors

    def tampered(path, state, metadata=None):
        name = "encoder/layer_norm/bias"
        write(path, state | {name: state[name] + np.float32(0.01)}, metadata)

    monkeypatch.setattr(state_dict, "write_tensors", tampered)
    with pytest.raises(UserError, match=r"differs from the student by .*: not written"):
        formats.convert(small, str(tmp_path / "hlo"), "stablehlo")
    assert os.listdir(tmp_path) == []


# failures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["hf", "fairseq", "orbax", "stablehlo"])
def test_a_full_disk_leaves_nothing_behind(sources, tmp_path, to):
    """A limit on the size of files stands for the full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 1024, before[1]))
        with pytest.raises(UserError, match="out cannot be written"):
            formats.convert(str(sources / "x.pt"), str(tmp_path / "out"), to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("directory", [False, True])
def test_an_output_that_exists_is_left_alone(small, tmp_path, directory):
    path = tmp_path / "out"
    path.mkdir() if directory else path.write_text("mine")
    for to in ("hf", "fairseq", "orbax", "stablehlo"):
        with pytest.raises(UserError, match="out exists already; choose another output"):
            formats.convert(small, str(path), to)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(path) == [] if directory else path.read_text() == "mine"


def command(*options, run=("-m", "mert_jax.convert")) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *run, *options],
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_the_command(small, tmp_path):
    done = command(f"--input={small}", f"--output={tmp_path / 'o'}", "--to=hf", "--license=mit")
    assert done.returncode == 0, done.stderr
    assert "read hf (Hugging Face): 2 post-norm layers of 16" in done.stdout
    assert "24000 Hz, waves as they are" in done.stdout
    assert f"wrote {tmp_path / 'o'}" in done.stdout
    assert read_checkpoint(tmp_path / "o").about.licence == "mit"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input=/nowhere", "--to=hf"], "/nowhere does not exist"),
        (["--input=x", "--to=onnx"], "should be one of <hf|fairseq|orbax|stablehlo>"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(tmp_path, options, message):
    done = command(*options, f"--output={tmp_path / 'out'}")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []


# full size ---------------------------------------------------------------------------------------

HEADS = {"95m": 12, "330m": 16}
# prints a command's own peak memory: getrusage() of a child would count this process's too
PEAK = """
import runpy, sys
try:
    runpy.run_module("mert_jax.convert", run_name="__main__", alter_sys=True)
finally:
    with open("/proc/self/status") as f:
        print(*(line for line in f if line.startswith("VmHWM")), file=sys.stderr)
"""


def full_size_file(path, size: str, dtype, flat: bool) -> None:
    """A fairseq file with the official names and shapes, of random weights and moments."""
    listed = json.loads((GOLDEN / f"shapes_student_{size}.json").read_text())
    rng = np.random.default_rng(0)
    state = {
        name: rng.standard_normal(shape, np.float32).astype(dtype)
        for name, shape, _ in listed["fairseq_state_dict"]
        if not tensor_names.BUFFERS.search(name)
    }
    assert list(state) == listed["fairseq_trainable_names"]
    last = checkpoint_samples.moments(state, flat, step=400_000)
    model = fairseq.student({"encoder_attention_heads": HEADS[size]}, state)
    model = model.clone(pre_norm=size == "330m")
    tables = {name: x.astype(dtype) for name, x in fairseq.cqt_tables(336).items()}
    tensors = {name: (state | tables)[name] for name, *_ in listed["fairseq_state_dict"]}
    content = checkpoint_samples.content(model, tensors, last_optimizer_state=last)
    content["cfg"] = checkpoint_samples.settings(model, fairseq.DEFAULT_CONV)
    torch_pickle.write_pickle(path, content)


def digest(x: np.ndarray) -> tuple:
    """Return a tensor's dtype, shape and a hash of its bytes."""
    content = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return x.dtype.name, x.shape, hashlib.blake2b(content, digest_size=16).hexdigest()


def fairseq_digests(path) -> tuple[dict, dict]:
    """Return the digests of a file's tensors, and of its moments."""
    content = torch_pickle.read_pickle(path)
    moments = {
        (i, key): digest(entry[key])
        for i, entry in content["last_optimizer_state"]["state"].items()
        for key in ("exp_avg", "exp_avg_sq")
    }
    return {name: digest(x) for name, x in content["model"].items()}, moments


def hf_digests(folder) -> dict:
    with safe_open(f"{folder}/model.safetensors", "numpy") as file:
        return {name: digest(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118


@pytest.mark.slow
@pytest.mark.parametrize("size", HEADS)
@pytest.mark.parametrize("kind", ["flat", "each"])
def test_every_loop_at_full_size(tmp_path, size, kind, record_property):
    """Needs room on disk for three checkpoints, 11 GB for the 330M."""
    paths = {name: tmp_path / name for name in ("x.pt", "run", "back.pt", "hf", "run2", "hf2")}

    def run(source: str, output: str, to: str) -> None:
        began = time.monotonic()
        options = (f"--input={paths[source]}", f"--output={paths[output]}", f"--to={to}")
        done = command(*options, run=("-c", PEAK))
        assert done.returncode == 0, done.stderr
        gib = int(re.search(r"VmHWM:\s+(\d+) kB", done.stderr)[1]) / 2**20
        seconds = time.monotonic() - began
        print(f"{size} {kind}: {source} -> {output}: {seconds:.0f} s, {gib:.1f} GiB at most")
        record_property(f"{source}_to_{output}", f"{seconds:.0f} s, {gib:.1f} GiB")
        assert gib < 24e9 / 2**30

    dtype = np.float16 if kind == "flat" else np.float32
    full_size_file(paths["x.pt"], size, dtype, kind == "flat")
    tensors, moments = fairseq_digests(paths["x.pt"])
    run("x.pt", "run", "orbax")
    paths["x.pt"].unlink()
    run("run", "back.pt", "fairseq")
    again, moments_again = fairseq_digests(paths["back.pt"])
    assert list(again) == list(tensors)
    assert again == tensors
    assert moments_again == moments
    assert len(moments) == 2 * (1 if kind == "flat" else len(tensors) - 3)
    listed = json.loads((GOLDEN / f"shapes_student_{size}.json").read_text())
    official = [(name, tuple(shape)) for name, shape, _ in listed["fairseq_state_dict"]]
    assert [(name, shape) for name, (_, shape, _) in again.items()] == official
    paths["back.pt"].unlink()

    run("run", "hf", "hf")
    hf = hf_digests(paths["hf"])
    mapping = listed["converter_mapping_fairseq_to_hf_oldnames"]
    assert hf == {mapping[name]: x for name, x in tensors.items() if name in mapping}
    shapes = {name: tuple(shape) for name, shape in listed["hf_state_dict_old_names"]}
    assert {name: shape for name, (_, shape, _) in hf.items()} == shapes
    shutil.rmtree(paths["run"])
    run("hf", "run2", "orbax")
    run("run2", "hf2", "hf")
    assert hf_digests(paths["hf2"]) == hf
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@pytest.mark.slow
@pytest.mark.parametrize("size", HEADS)
def test_a_program_of_full_size(tmp_path, size, record_property):
    options = dict(hidden_size=768, num_layers=12, num_heads=12, intermediate_size=3072)
    if size == "330m":
        large = dict(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096)
        options = large | dict(pre_norm=True)
    model = hf_student(
        conv_dim=512,
        conv_kernels=(10, 3, 3, 3, 3, 2, 2),
        conv_strides=(5, 2, 2, 2, 2, 2, 2),
        pos_conv_kernel=128,
        pos_conv_groups=16,
        **options,
    )
    state = {name: 0.05 * x for name, x in hf_state(model).items()}
    source = hf_folder(tmp_path / "hf", model, state)
    began = time.monotonic()
    done = command(f"--input={source}", f"--output={tmp_path / 'hlo'}", "--to=stablehlo")
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    record_property("seconds", round(time.monotonic() - began))
    record_property("reloaded", done.stdout.partition("reloaded: ")[2].splitlines()[0])
