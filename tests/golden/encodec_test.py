"""The acoustic teacher against EnCodec."""

import functools
import os
import tempfile

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mert_jax import teachers
from mert_jax.errors import UserError
from mert_jax.models import quantize
from mert_jax.teachers import encodec_checkpoint
from mert_jax.teachers import rvq_vae as acoustic
from mert_jax.teachers.teacher import Teacher
from tests.golden_files import check, five_seconds, keys, max_error, names, npz, read_json

ENCODEC = keys("encodec.npz", r".*/audio_i16") if names("encodec_weights.npz") else []
ENCODEC_TIE = 1e-4  # of the distance to a decision boundary: closer, and rounding may decide


@functools.cache
def rvq_vae() -> Teacher:
    """The teacher, made of a file with the official names."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "encodec.safetensors")
        save_file(npz("encodec_weights.npz"), path)
        return teachers.make("rvq_vae", checkpoint=path)


@functools.cache
def encodec_run(clip: str) -> dict[str, np.ndarray]:
    """Every stored array of a clip, by its key, and `codes` of the teacher itself."""
    stored, teacher = npz("encodec.npz"), rvq_vae()
    audio = stored.get(f"{clip}/audio_i16")
    audio = five_seconds()[:, : int(clip.rpartition("_")[2])] if audio is None else audio
    wave = np.atleast_2d(audio).astype(np.float32) / 32768

    @jax.jit
    def run(params, wave):
        network = acoustic.encoder(params)
        variables = {"params": params["encoder"]}
        latents, seen = network.apply(
            variables, wave, capture_intermediates=True, mutable=["intermediates"]
        )
        squares = quantize.residual_encode(latents, params["codebooks"])[1]
        return latents, squares, seen["intermediates"], teacher.apply(params, wave)

    latents, squares, seen, codes = run(teacher.params, wave)

    def out(name):
        return seen[name]["__call__"][0]

    stages = {0: out("conv_in"), 15: latents}
    for i in range(4):
        stages |= {1 + 3 * i: out(f"block_{i}"), 3 + 3 * i: out(f"down_{i}")}
        stages[2 + 3 * i] = jax.nn.elu(stages[1 + 3 * i])
    stages[13] = out("down_3") + out("lstm_1")
    stages[14] = jax.nn.elu(stages[13])
    entering = np.concatenate([np.square(latents).sum(-1, keepdims=True), squares[..., :-1]], -1)
    found = {"latent": latents, "codes": codes, "residual_sqnorm": entering}
    for number, x in stages.items():
        found[f"stage{number:02}_b0_first8"] = x[:1, :8]
        found[f"stage{number:02}_b0_last8"] = x[:1, -8:]
    found = {key: np.asarray(x).swapaxes(1, 2) for key, x in found.items()}
    return {key: x[0] if key.startswith("stage") else x for key, x in found.items()}


def surely_equal(clip: str) -> np.ndarray:
    """Codes [B, K, T] that rounding cannot change: theirs and all earlier levels' boundaries are
    far enough away."""
    distance = npz("encodec.npz").get(f"{clip}/boundary_distance")
    if distance is None:
        return np.ones_like(npz("encodec.npz")[f"{clip}/codes"], bool)
    return np.logical_and.accumulate(distance > ENCODEC_TIE, 1)


@pytest.mark.parametrize("key", ENCODEC)
def test_encodec(key, record_property):
    clip, what = key.rsplit("/", 1)
    stored, ours = npz("encodec.npz")[key], encodec_run(clip)
    if what.startswith("codes"):
        differ = ours["codes"] != stored
        assert differ.shape == stored.shape
        assert not (differ & surely_equal(clip)).any()
        record_property("excused_flips", int(differ.sum()))
    elif what in ("margin", "boundary_distance"):  # what the codes' rule is made of
        assert stored.shape == ours["codes"].shape
        assert (stored >= 0).all()
    elif what == "residual_sqnorm":
        same = surely_equal(clip)
        reached = np.concatenate([np.ones_like(same[:, :1]), same[:, :-1]], 1)
        error = np.abs(ours[what] - stored)[reached]
        check(record_property, error.max(), 1e-4 * stored.max())
    else:
        scale = 1 if what == "latent" else max(np.abs(stored).max(), 1)
        check(record_property, max_error(ours[what], stored), 3e-5 * scale)


@pytest.mark.parametrize(
    "clip",
    [
        k
        for k, x in read_json("encodec_summary.json").items()
        if isinstance(x, dict) and "frames" in x
    ],
)
def test_encodec_summary(clip):
    stored = read_json("encodec_summary.json")[clip]
    if f"{clip}/codes" not in npz("encodec.npz"):
        pytest.skip(f"encodec.npz has no {clip}")
    codes = encodec_run(clip)["codes"]
    assert codes.shape[-1] == stored["frames"]
    if "n_codes" in stored:
        assert codes.size == stored["n_codes"]
    if "unique_codes" in stored and surely_equal(clip).all():
        assert [len(np.unique(codes[:, k])) for k in range(codes.shape[1])] == stored[
            "unique_codes"
        ]
    if "latent_std" in stored:
        latent = encodec_run(clip)["latent"]
        np.testing.assert_allclose(latent.std(ddof=1), stored["latent_std"], rtol=1e-4)


@pytest.mark.parametrize("names_of", ["official", "hf_new_names"])
@pytest.mark.skipif(not names("shapes_encodec_24khz.json"), reason="no shapes_encodec_24khz.json")
def test_names_and_shapes_of_the_full_size_encodec(names_of):
    listed = read_json("shapes_encodec_24khz.json")
    state = {name: np.broadcast_to(np.float32(1), shape) for name, shape, *_ in listed[names_of]}
    params = encodec_checkpoint.from_state(state)
    assert params["codebooks"].shape == (listed["n_q"], 1024, 128)
    needed = dict.fromkeys(listed["needed_for_encoding_at_6kbps"])
    if names_of == "official":
        assert listed["needed_parameter_count"] == sum(state[name].size for name in needed)
        without = {name: x for name, x in state.items() if name in needed}
        assert encodec_checkpoint.from_state(without)["codebooks"].shape == (8, 1024, 128)
        for name in needed:
            if "codebook.embed" not in name:
                with pytest.raises(UserError, match="1 tensors differ"):
                    encodec_checkpoint.from_state({k: x for k, x in without.items() if k != name})
                break
