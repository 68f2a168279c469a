"""The student in Hugging Face's flavour, and the names and shapes of the full sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mert_jax.checkpoints import fairseq, huggingface
from mert_jax.checkpoints import tensor_names as official
from mert_jax.tensors.state_dict import read_tensors as read_weights
from tests import frame_padding
from tests.golden_files import (
    FOLDER,
    check,
    every_frame_stored,
    fake_state,
    five_seconds,
    keys,
    max_error,
    names,
    npz,
    read_json,
)

HF_WEIGHTS = [
    (file, weights)
    for file in names("hf_*.npz")
    for weights in names(f"{file[:-4]}_weights*.safetensors") or [None]
]


@functools.cache
def hf_run(file: str, weights: str) -> dict[str, np.ndarray]:
    """Everything that an hf_*.npz may hold, from the weights of one spelling."""
    stored, config = npz(file), read_json(f"{file[:-4]}_config.json")
    if not (config and weights):
        pytest.skip(f"{file} needs its _config.json and _weights.safetensors in the same folder")
    student = huggingface.student(config)
    params = official.params_from_hf(read_weights(FOLDER / weights), student)
    audio = stored["audio_i16"] if "audio_i16" in stored else five_seconds()
    wave = audio.astype(np.float32) / 32768
    length = student.num_frames(wave.shape[1])

    @jax.jit
    def forward(wave, padding):
        return student.apply(
            {"params": params}, wave, padding=padding, deterministic=True, mutable="intermediates"
        )

    ours = {}
    for mode in ("nomask", "mask"):
        padding = None
        if mode == "mask":
            if "valid_len" not in stored:
                continue
            valid = jnp.asarray(stored["valid_len"])
            padding = frame_padding.conv_frame_padding(
                valid, student.conv_kernels, student.conv_strides, length
            )
            ours["mask/frame_attention_mask"] = ~np.asarray(padding)
            wave = np.where(np.arange(wave.shape[1]) < stored["valid_len"][:, None], wave, 0)
        output, variables = forward(wave, padding)
        seen = variables["intermediates"]
        layers = np.asarray(seen["encoder"]["layers"]["hidden_states"][0])
        ours[f"{mode}/hidden_states_0"] = seen["encoder"]["encoder_input"][0]
        for i, layer in enumerate(layers, 1):
            last = i == student.num_layers
            ours[f"{mode}/hidden_states_{i}"] = output.last_hidden_state if last else layer
        ours[f"{mode}/last_layer_raw"] = layers[-1]
        ours[f"{mode}/conv_features"] = np.moveaxis(seen["conv_features"][0], -1, 1)
    return {key: np.asarray(x) for key, x in ours.items()}


@pytest.mark.parametrize(
    ("file", "weights", "key"),
    [(file, w, key) for file, w in HF_WEIGHTS for key in keys(file, "audio_i16|valid_len")],
)
def test_hugging_face(file, weights, key, record_property):
    ours, stored = hf_run(file, weights)[key], npz(file)[key]
    if stored.dtype == bool:
        np.testing.assert_array_equal(ours, stored)
        return
    if ours.shape != stored.shape:
        ours = every_frame_stored(ours, stored, 2 if key.endswith("conv_features") else 1)
    check(record_property, max_error(ours, stored), 1e-4)


@pytest.mark.parametrize("file", names("shapes_student_*.json"))
def test_names_and_shapes_of_the_full_size(file):
    listed = read_json(file)
    state = fake_state(listed["fairseq_state_dict"])
    student = fairseq.student({"encoder_attention_heads": 1}, state)
    shapes = jax.eval_shape(student.init, jax.random.key(0), jnp.zeros((1, 4000)))["params"]
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), nn.unbox(shapes))
    ours = official.params_to_fairseq(zeros)
    assert set(ours) == set(listed["fairseq_trainable_names"])
    assert all(ours[name].shape == state[name].shape for name in ours)
    assert sum(x.size for x in ours.values()) == listed["fairseq_trainable_parameter_count"]

    body = official.params_to_hf(zeros)
    assert sum(x.size for x in body.values()) == listed["hf_parameter_count"]
    old = {name: tuple(shape) for name, shape in listed["hf_state_dict_old_names"]}
    assert {name: x.shape for name, x in body.items()} == old
    headless = student.clone(heads=(), project_equal_widths=True)
    for names_of in ("hf_state_dict_old_names", "hf_state_dict_new_names"):
        params = official.params_from_hf(fake_state(listed[names_of]), headless)
        assert official.params_to_hf(params).keys() == body.keys()

    paths = set(jax.tree.leaves(jax.tree_util.tree_map_with_path(lambda p, _: _path(p), zeros)))
    mapping = {}
    for path in paths:
        theirs, hf = (official.official_name(path, paths, style) for style in (0, 1))
        for layer in range(student.num_layers if path.startswith("encoder/layers") else 1):
            mapping[theirs.format(layer)] = hf and hf.format(layer)
    unused = {name for name, hf in mapping.items() if hf is None}
    assert unused == {
        name for name in listed["converter_unused_or_skipped"] if not official.BUFFERS.search(name)
    }
    expected = listed["converter_mapping_fairseq_to_hf_oldnames"]
    assert {name: hf for name, hf in mapping.items() if hf} == expected


def _path(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
