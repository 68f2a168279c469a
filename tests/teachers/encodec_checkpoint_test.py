"""EnCodec checkpoints: every spelling, a round trip, and the errors for a wrong one."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mert_jax import teachers
from mert_jax.errors import UserError
from mert_jax.teachers import encodec_checkpoint
from tests.codec_samples import BOOKS, SIZE, params


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("encodec")
    encodec_checkpoint.write_encodec(str(path), params())
    return path


@pytest.fixture
def state(checkpoint) -> dict[str, np.ndarray]:
    return load_file(checkpoint / "model.safetensors")


def official_names(state: dict) -> dict:
    """The tensors under the names of the official file."""
    official = {}
    for name, x in state.items():
        for part in ("encoder", "decoder"):
            name = name.replace(f"{part}.layers.", f"{part}.model.")
        up = any(name.startswith(f"decoder.model.{i}.") for i in (3, 6, 9, 12))
        inner = "convtr" if up else "conv"
        name = name.replace(".conv.", f".{inner}.{inner}.")
        name = name.replace("quantizer.layers.", "quantizer.vq.layers.")
        name = name.replace(".codebook.", "._codebook.")
        name = name.replace("parametrizations.weight.original0", "weight_g")
        official[name.replace("parametrizations.weight.original1", "weight_v")] = x
    return official


def read_back() -> dict:
    return {name: params()[name] for name in ("encoder", "codebooks")}


def assert_equal(ours: dict, theirs: dict) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)


def test_encoder_and_codebooks_make_a_round_trip(checkpoint):
    for path in (checkpoint, checkpoint / "model.safetensors"):
        assert_equal(encodec_checkpoint.read_encodec(str(path)), read_back())


def test_official_names_are_read(state, tmp_path):
    official = official_names(state)
    assert "decoder.model.3.convtr.convtr.weight_g" in official
    assert "encoder.model.1.block.1.conv.conv.weight_v" in official
    save_file(official, tmp_path / "official.safetensors")
    ours = encodec_checkpoint.read_encodec(str(tmp_path / "official.safetensors"))
    assert_equal(ours, read_back())


def test_an_encoder_alone_is_enough(state):
    encoder = {name: x for name, x in state.items() if not name.startswith("decoder")}
    assert_equal(encodec_checkpoint.from_state(encoder), read_back())


def test_all_wrong_tensors_are_named(state):
    broken = dict(state)
    del broken["encoder.layers.13.lstm.weight_hh_l1"]
    del broken["encoder.layers.6.conv.bias"]
    broken["encoder.layers.99.conv.bias"] = np.zeros(3, np.float32)
    broken["encoder.layers.15.conv.bias"] = np.zeros(3, np.float32)
    with pytest.raises(UserError) as e:
        encodec_checkpoint.from_state(broken, "my.th")
    for words in (
        "my.th",
        "4 tensors differ",
        "encoder.layers.13.lstm.weight_hh_l1 is missing, not float32",
        "encoder.layers.6.conv.bias is missing, not float32",
        "encoder.layers.99.conv.bias is float32 [3], not expected",
        "encoder.layers.15.conv.bias is float32 [3], not float32 [8]",
    ):
        assert words in str(e.value)


def test_another_model_is_refused():
    with pytest.raises(UserError, match="not a complete 24 kHz EnCodec"):
        encodec_checkpoint.from_state({"lm_head.weight": np.zeros((2, 2))})


def test_the_48_khz_encodec_is_refused(state):
    name = "encoder.layers.0.conv.parametrizations.weight.original1"
    stereo = state | {name: np.repeat(state[name], 2, 1)}
    with pytest.raises(UserError, match=r"float32 \[2, 2, 7\], not float32 \[2, 1, 7\]"):
        encodec_checkpoint.from_state(stereo)


def test_another_sampling_rate_is_refused(tmp_path):
    encodec_checkpoint.write_encodec(str(tmp_path), params())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"sampling_rate": 32_000}))
    with pytest.raises(UserError, match="32000 Hz"):
        encodec_checkpoint.read_encodec(str(tmp_path))


def test_the_teacher_takes_the_first_codebooks(checkpoint):
    teacher = teachers.make("rvq_vae", checkpoint=str(checkpoint))
    wave = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2000)), jnp.bfloat16)
    codes = jax.jit(teacher.apply)(teacher.params, wave)
    assert codes.shape == (2, 7, BOOKS)
    assert codes.dtype == jnp.int32
    assert teacher.size == SIZE
    two = teachers.make("rvq_vae", checkpoint=str(checkpoint), books=2)
    np.testing.assert_array_equal(jax.jit(two.apply)(two.params, wave), codes[..., :2])


@pytest.mark.parametrize("books", [-1, 4])
def test_missing_codebooks_are_refused(checkpoint, books):
    with pytest.raises(UserError, match=f"books={books}.*3 codebooks"):
        teachers.make("rvq_vae", checkpoint=str(checkpoint), books=books)


def test_a_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="fit_teacher"):
        teachers.make("rvq_vae")
    with pytest.raises(UserError, match=r"model\.safetensors or pytorch_model\.bin"):
        teachers.make("rvq_vae", checkpoint=str(tmp_path))
    with pytest.raises(UserError, match=r"nowhere\.th"):
        teachers.make("rvq_vae", checkpoint=str(tmp_path / "nowhere.th"))
