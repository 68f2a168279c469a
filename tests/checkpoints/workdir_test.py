"""Checkpoints in workdirs: round trips, damage, and the detection of formats."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

from mert_jax.checkpoints import in_memory, workdir
from mert_jax.checkpoints.formats import kind_of, read_checkpoint
from mert_jax.errors import UserError
from tests import checkpoint_samples
from tests.checkpoint_samples import FLAVOURS, assert_same, params_of, student

ABOUT = in_memory.About(
    sample_rate=16_000,
    do_normalize=True,
    dtype="bfloat16",
    flat_moments=True,
    special_codes=0,
    row_orders=((1, 0), (0, 1)),
    teachers={"cqt": "abc"},
    licence="mit",
    data=({"name": "folk", "hours": 1.5},),
    lineage=("MERT-v1-95M.pt (fairseq)",),
)


def checkpoint_of(student, moments: bool = True, step: int = 5) -> in_memory.Checkpoint:
    adam = (params_of(student, 1), params_of(student, 2)) if moments else None
    return in_memory.Checkpoint(student, params_of(student), adam, step, ABOUT)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A workdir with moments."""
    path = tmp_path_factory.mktemp("written") / "run"
    path.mkdir()
    workdir.write_checkpoint(str(path), checkpoint_of(student()))
    return path


@pytest.fixture
def run(written, tmp_path):
    """A copy of the workdir that a test may damage."""
    return shutil.copytree(written, tmp_path / "run")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_there_and_back(tmp_path, flavour):
    first = checkpoint_of(student(**FLAVOURS[flavour]))
    workdir.write_checkpoint(str(tmp_path), first)
    checkpoint = read_checkpoint(tmp_path)
    assert checkpoint.student == first.student
    assert checkpoint.step == 5
    assert_same(checkpoint.params, first.params)
    assert_same(checkpoint.moments, first.moments)
    lineage = (*ABOUT.lineage, f"{tmp_path.name} (step 5)")
    about, expected = (
        json.loads(json.dumps(x._asdict()))
        for x in (checkpoint.about, ABOUT._replace(lineage=lineage))
    )
    assert about == expected
    assert {type(x) for x in jax.tree.leaves(checkpoint.params)} == {np.ndarray}


def test_without_moments(written, tmp_path):
    assert read_checkpoint(written, moments=False).moments is None
    workdir.write_checkpoint(str(tmp_path), checkpoint_of(student(), moments=False, step=0))
    checkpoint = read_checkpoint(tmp_path)
    assert (checkpoint.moments, checkpoint.step) == (None, 0)
    assert_same(checkpoint.params, params_of(student()))


def test_the_newest_step_or_the_one_named(run):
    other = run.parent / "other"
    other.mkdir()
    changed = params_of(student(), 9)
    workdir.write_checkpoint(str(other), checkpoint_of(student(), step=12)._replace(params=changed))
    shutil.move(other / "checkpoints" / "12", run / "checkpoints" / "12")
    (run / "checkpoints" / "13.orbax-checkpoint-tmp-1").mkdir()
    newest, older = read_checkpoint(run), read_checkpoint(f"{run}/checkpoints/5/")
    assert (newest.step, older.step) == (12, 5)
    assert_same(newest.params, changed)
    assert_same(older.params, params_of(student()))
    assert older.about.lineage[-1] == "run (step 5)"


def test_settings_and_metrics_of_the_run_at_its_step(run):
    (run / "config.json").write_text(json.dumps({"total_steps": 9}))
    rows = [{"step": 2, "loss": 3.0}, {"step": 4, "loss": 2.0}, {"step": 6, "loss": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = read_checkpoint(run).about
    assert about.config == {"total_steps": 9}
    assert about.metrics == {"step": 4, "loss": 2.0}


# damaged workdirs --------------------------------------------------------------------------------


def test_a_checkpoint_with_any_file_cut_short_is_refused_or_the_same(run):
    intact = read_checkpoint(run)
    root = run / "checkpoints" / "5"
    files = [os.path.join(at, name) for at, _, names in os.walk(root) for name in names]
    refused = 0
    for file in files:
        with open(file, "rb") as f:
            content = f.read()
        with open(file, "wb") as f:
            f.write(content[: len(content) // 2])
        try:
            assert_same(read_checkpoint(run).params, intact.params)
        except UserError:
            refused += 1
        with open(file, "wb") as f:
            f.write(content)
    assert refused >= 4
    assert_same(read_checkpoint(run).params, intact.params)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "cannot be read"),
        ("[]", "holds a list"),
        ("{}", "does not describe a student: KeyError"),
        ('{"student": 3}', "does not describe a student"),
        ('{"student": {"heads": []}}', "does not describe a student: KeyError"),
        ('{"student": {"heads": [{"name": "x"}]}}', "does not describe a student"),
    ],
)
def test_without_a_sound_model_json_the_student_is_not_known(run, content, message):
    os.unlink(run / "model.json")
    if content is not None:
        (run / "model.json").write_text(content)
    with pytest.raises(UserError, match=rf"run/model\.json {message}"):
        read_checkpoint(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, r"encoder/layers/layer_norm/bias is \[2, 16\], not \[3, 16\]"),
        ({"hidden_size": 32}, r"masked_spec_embed is \[16\], not \[32\]"),
        ({"heads": []}, "unexpected cqt_proj/bias"),
        ({"num_heads": 5}, "'num_heads': 5"),
        ({"conv_kernels": [10, 3]}, "no student can have"),
        ({"conv_dim": "eight"}, "no student can have"),
    ],
)
def test_a_model_json_of_another_student(run, change, message):
    content = json.loads((run / "model.json").read_text())
    content["student"] |= change
    (run / "model.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_checkpoint(run)


@pytest.mark.parametrize("where", ["params", "mu"])
def test_every_wrong_tensor_is_listed(tmp_path, where):
    first = checkpoint_of(student())
    tree = first.params if where == "params" else first.moments[0]
    tree["masked_spec_embed"][:3] = np.nan
    del tree["encoder"]["layer_norm"]["bias"]
    tree["surprise"] = np.zeros(2, np.float32)
    workdir.write_checkpoint(str(tmp_path), first)
    with pytest.raises(UserError) as raised:
        read_checkpoint(tmp_path)
    for words in (
        "missing encoder/layer_norm/bias",
        "unexpected surprise",
        "masked_spec_embed has 3 values that are not finite",
        "step 5" if where == "params" else "mu",
    ):
        assert words in str(raised.value)


def test_a_run_that_has_not_saved_yet(tmp_path):
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp-1").mkdir(parents=True)
    with pytest.raises(UserError, match="no finished checkpoint"):
        read_checkpoint(tmp_path)


def test_a_checkpoint_that_was_moved_away_from_its_run(run):
    moved = run.parent / "final"
    shutil.move(run / "checkpoints" / "5", moved)
    with pytest.raises(UserError, match="final is a checkpoint away from its run"):
        read_checkpoint(moved)


def test_a_garbled_metrics_file(run):
    (run / "metrics.jsonl").write_text("not json\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1 is not JSON"):
        read_checkpoint(run)


# detection of formats ----------------------------------------------------------------------------


def test_kinds(run, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "x.pt").write_text("")
    assert kind_of(run) == "orbax"
    assert kind_of(run / "checkpoints" / "5") == "orbax"
    assert kind_of(tmp_path / "hf") == "hf"
    assert kind_of(tmp_path / "x.pt") == "fairseq"
    (run / "config.json").write_text("{}")
    assert kind_of(run) == "orbax"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "does not exist"),
        ("empty", r"not a checkpoint: it has neither checkpoints/ nor config\.json"),
        ("model.safetensors", r"weights without their config\.json"),
        ("pytorch_model.bin", r"weights without their config\.json"),
    ],
)
def test_paths_of_no_checkpoint(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    for file in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        read_checkpoint(tmp_path / name)


def test_a_student_survives_json():
    headless = checkpoint_samples.hf_student()
    for model in (*(student(**options) for options in FLAVOURS.values()), headless):
        numbers = json.loads(json.dumps(in_memory.architecture(model)))
        assert in_memory.student_of(numbers) == model
