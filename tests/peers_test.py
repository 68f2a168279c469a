"""Live peers on the CPU: transformers' HuBERT at full size and nnAudio (the extra [peers])."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax import convert, masking, teachers

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch", reason="torch is missing; pip install mert_jax[peers]")

SIZES = {
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
}


@pytest.mark.parametrize("size", ["base", pytest.param("large", marks=pytest.mark.slow)])
def test_all_hidden_states_of_a_full_size_model(size, record_property):
    transformers = pytest.importorskip("transformers", reason="pip install mert_jax[peers]")
    torch.manual_seed(0)
    config = transformers.HubertConfig(
        **SIZES[size],
        intermediate_size=4 * SIZES[size]["hidden_size"],
        do_stable_layer_norm=size == "large",
    )
    peer = transformers.HubertModel(config).eval()
    with torch.no_grad():  # norms and biases too, so that a mix-up shows
        for parameter in peer.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    wave = 0.1 * np.random.default_rng(0).normal(size=(2, 24_000)).astype(np.float32)
    valid = np.array([24_000, 17_000])
    wave[1, valid[1] :] = 0
    with torch.no_grad():
        theirs = peer(
            torch.tensor(wave),
            attention_mask=torch.arange(24_000)[None] < torch.tensor(valid)[:, None],
            output_hidden_states=True,
        )

    student = convert.student_from_hf(config.to_dict())
    state = {name: x.numpy() for name, x in peer.state_dict().items()}
    params = convert.params_from_hf(state, student)
    padding = masking.conv_frame_padding(
        jnp.asarray(valid), student.conv_kernels, student.conv_strides, student.num_frames(24_000)
    )
    forward = jax.jit(
        lambda params, wave: student.apply(
            {"params": params}, wave, padding=padding, mutable=["intermediates"]
        )
    )
    output, seen = forward(params, wave)
    encoder = seen["intermediates"]["encoder"]
    # transformers 5 returns the raw last layer, 4 returned it after the final norm
    ours = [encoder["encoder_input"][0], *encoder["layers"]["hidden_states"][0]]
    if int(transformers.__version__.split(".")[0]) < 5:
        ours[-1] = output.last_hidden_state
    assert len(theirs.hidden_states) == len(ours)
    errors = [np.abs(a - b.numpy()).max() for a, b in zip(ours, theirs.hidden_states, strict=True)]
    last = np.abs(output.last_hidden_state - theirs.last_hidden_state.numpy()).max()
    print(f"largest differences from transformers {transformers.__version__}: {errors}, {last}")
    record_property("max_error", float(max(*errors, last)))
    assert max(*errors, last) < 1e-4


def test_nnaudio(record_property):
    features = pytest.importorskip("nnAudio.features", reason="pip install mert_jax[peers]")
    wave = 0.1 * np.random.default_rng(0).normal(size=(2, 24_320)).astype(np.float32)
    wave += 0.3 * np.sin(2 * np.pi * 220 * np.arange(24_320) / 24_000).astype(np.float32)
    layer = features.cqt.CQT(
        sr=24_000,
        hop_length=320,
        fmin=32.7,
        n_bins=336,
        bins_per_octave=48,
        pad_mode="constant",
        verbose=False,
    )
    with torch.no_grad():
        theirs = layer(torch.tensor(wave)).numpy().swapaxes(1, 2)
    teacher = teachers.make("cqt")
    ours = np.asarray(jax.jit(teacher.apply)(teacher.params, wave))
    record_property("max_error", float(np.abs(ours - theirs).max() / theirs.max()))
    assert np.abs(ours - theirs).max() <= 1e-4 * theirs.max()
    assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)
