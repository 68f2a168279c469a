"""The mapping of names: there and back, every spelling, and what is said of a wrong checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mert_jax import cli, convert, model

HEADS = (model.Head("rvq_vae", 68, 2), model.Head("cqt", 14))


def student(**options) -> model.Student:
    sizes = dict(
        conv_dim=8,
        conv_kernels=(10, 3, 2),
        conv_strides=(5, 2, 2),
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        intermediate_size=24,
        pre_norm=False,
        heads=HEADS,
        final_dim=4,
        pos_conv_kernel=8,
        pos_conv_groups=2,
    )
    return model.Student(**sizes | options)


def params_of(student: model.Student):
    params = nn.unbox(student.init(jax.random.key(0), jnp.zeros((1, 4000))))["params"]
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)  # biases and norms too, so that a mix-up shows
    return tree.unflatten([rng.normal(size=x.shape).astype(np.float32) for x in leaves])


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_fairseq_there_and_back():
    params = params_of(student())
    state = convert.params_to_fairseq(params)
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
    assert_same(convert.params_from_fairseq(state, student()), params)


def test_hugging_face_there_and_back_without_heads():
    params = params_of(student(heads=()))
    state = convert.params_to_hf(params)
    assert_same(convert.params_from_hf(state, student(heads=())), params)
    with_heads = params_of(student())
    assert convert.params_to_hf(with_heads).keys() == state.keys()


def test_three_spellings_of_weight_norm():
    body = student(heads=())
    state = convert.params_to_hf(params_of(body))
    conv = "encoder.pos_conv_embed.conv."
    g, v = state.pop(conv + "weight_g"), state.pop(conv + "weight_v")
    names = "parametrizations.weight.original0", "parametrizations.weight.original1"
    new = state | {conv + names[0]: g, conv + names[1]: v}
    folded = state | {conv + "weight": g * v / np.linalg.norm(v, axis=(0, 1), keepdims=True)}
    old = state | {conv + "weight_g": np.abs(g), conv + "weight_v": v * np.sign(g)}
    expected = convert.params_from_hf(new, body)
    positions = lambda params: params["encoder"]["pos_conv_embed"]
    kernel = lambda p: (
        p["weight_v"]
        * (p["weight_g"] / np.linalg.norm(p["weight_v"], axis=(1, 2))).reshape(-1, 1, 1)
    )
    for spelling in (folded, old):
        given = convert.params_from_hf(spelling, body)
        np.testing.assert_allclose(
            kernel(positions(given)), kernel(positions(expected)), rtol=1e-5, atol=1e-6
        )


def test_equal_widths():
    plain, projected = student(conv_dim=16), student(conv_dim=16, project_equal_widths=True)
    params = params_of(plain)
    assert "post_extract_proj.weight" not in convert.params_to_fairseq(params)
    state = convert.params_to_hf(params)
    wave = np.random.default_rng(0).normal(size=(1, 400)).astype(np.float32)
    hidden = convert.params_from_hf(state, projected.clone(heads=()))
    ours, theirs = (
        plain.apply({"params": params}, wave),
        projected.clone(heads=()).apply({"params": hidden}, wave),
    )
    np.testing.assert_allclose(ours.last_hidden_state, theirs.last_hidden_state, atol=1e-5)


def test_tables_of_the_cqt_are_ignored():
    state = convert.params_to_fairseq(params_of(student()))
    tables = ("lenghts", "cqt_kernels_real", "cqt_kernels_imag")
    state |= {f"encoder_cqt_model.spec_layer.{name}": np.zeros(3) for name in tables}
    convert.params_from_fairseq(state, student())


def test_everything_wrong_is_said_at_once():
    state = convert.params_to_fairseq(params_of(student()))
    del state["mask_emb"], state["encoder.layers.1.fc2.bias"]
    state["surprise"] = np.zeros(1)
    state["layer_norm.weight"] = np.zeros(5)
    with pytest.raises(cli.UserError) as raised:
        convert.params_from_fairseq(state, student())
    for words in (
        "missing mask_emb",
        "missing encoder.layers.1.fc2.bias",
        "unexpected surprise",
        "layer_norm.weight is [5], not [8]",
    ):
        assert words in str(raised.value)


def test_two_teachers_of_codes_do_not_fit_in_one_fairseq_checkpoint():
    heads = (model.Head("rvq_vae", 68, 2), model.Head("kmeans", 36, 1))
    with pytest.raises(cli.UserError, match=r"one (final_proj|label_embs_concat)"):
        convert.params_to_fairseq(params_of(student(heads=heads)))


def test_half_precision_tensors_become_float32():
    state = convert.params_to_fairseq(params_of(student()))
    half = {name: x.astype(np.float16) for name, x in state.items()}
    params = convert.params_from_fairseq(half, student())
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}


def test_students_from_configs():
    state = convert.params_to_fairseq(params_of(student()))
    config = dict(
        conv_feature_layers="[(8,10,5)] + [(8,3,2)] * 1 + [(8,2,2)]", encoder_attention_heads=4
    )
    assert convert.student_from_fairseq(config, state) == student()
    with pytest.raises(cli.UserError, match="deepnorm=True"):
        convert.student_from_hf(dict(deepnorm=True))


@pytest.mark.parametrize("text", ["__import__('os')", "[(1,2,3)] + x", "[(1,2,3)] ** 2"])
def test_conv_layers_are_parsed_not_run(text):
    with pytest.raises(cli.UserError, match="not understood"):
        convert.conv_layers(text)


def test_conv_layers():
    parsed = convert.conv_layers("[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2")
    assert parsed == [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2
