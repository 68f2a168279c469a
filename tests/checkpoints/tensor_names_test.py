"""The mapping of tensor names: round trips, spellings of weight norm, and wrong checkpoints."""

import jax
import numpy as np

from mert_jax.checkpoints import tensor_names
from tests.checkpoint_samples import assert_same, params_of, pos_conv_kernel, student


def test_fairseq_there_and_back():
    params = params_of(student())
    state = tensor_names.params_to_fairseq(params)
    assert state["label_embs_concat"].shape == (2 * 68, 4)
    assert state["encoder.pos_conv.0.weight_g"].shape == (1, 1, 8)
    assert state["feature_extractor.conv_layers.1.0.weight"].shape == (8, 8, 3)
    np.testing.assert_array_equal(
        state["encoder.layers.1.fc1.weight"],
        params["encoder"]["layers"]["intermediate_dense"]["kernel"][1].T,
    )
    np.testing.assert_array_equal(
        state["label_embs_concat"][68 + 5], params["rvq_vae_codebooks"][1, 5]
    )
    assert_same(tensor_names.params_from_fairseq(state, student()), params)


def test_hugging_face_there_and_back_without_heads():
    params = params_of(student(heads=()))
    state = tensor_names.params_to_hf(params)
    assert_same(tensor_names.params_from_hf(state, student(heads=())), params)
    with_heads = params_of(student())
    assert tensor_names.params_to_hf(with_heads).keys() == state.keys()


def test_two_spellings_of_weight_norm():
    body = student(heads=())
    state = tensor_names.params_to_hf(params_of(body))
    conv = "encoder.pos_conv_embed.conv."
    g, v = state.pop(conv + "weight_g"), state.pop(conv + "weight_v")
    spelt = "parametrizations.weight.original0", "parametrizations.weight.original1"
    new = state | {conv + spelt[0]: g, conv + spelt[1]: v}
    old = state | {conv + "weight_g": np.abs(g), conv + "weight_v": v * np.sign(g)}
    expected = tensor_names.params_from_hf(new, body)
    kernel = pos_conv_kernel(tensor_names.params_from_hf(old, body))
    np.testing.assert_allclose(kernel, pos_conv_kernel(expected), rtol=1e-5, atol=1e-6)


def test_equal_widths():
    plain, projected = student(conv_dim=16), student(conv_dim=16, project_equal_widths=True)
    params = params_of(plain)
    assert "post_extract_proj.weight" not in tensor_names.params_to_fairseq(params)
    state = tensor_names.params_to_hf(params)
    wave = np.random.default_rng(0).normal(size=(1, 400)).astype(np.float32)
    hidden = tensor_names.params_from_hf(state, projected.clone(heads=()))
    expected, actual = (
        jax.jit(plain.apply)({"params": params}, wave),
        jax.jit(projected.clone(heads=()).apply)({"params": hidden}, wave),
    )
    np.testing.assert_allclose(actual.last_hidden_state, expected.last_hidden_state, atol=1e-5)


def test_tables_of_the_cqt_are_ignored():
    state = tensor_names.params_to_fairseq(params_of(student()))
    tables = ("lenghts", "cqt_kernels_real", "cqt_kernels_imag")
    state |= {f"encoder_cqt_model.spec_layer.{name}": np.zeros(3) for name in tables}
    tensor_names.params_from_fairseq(state, student())


def test_half_precision_tensors_become_float32():
    state = tensor_names.params_to_fairseq(params_of(student()))
    half = {name: x.astype(np.float16) for name, x in state.items()}
    params = tensor_names.params_from_fairseq(half, student())
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
