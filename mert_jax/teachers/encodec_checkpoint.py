"""EnCodec checkpoints to and from the parameters of `models/encodec.py`, by name and layout.

Reads encoder and codebooks from the official state dict (`encodec_24khz-*.th`), a Hugging Face
directory or its weights file, in each spelling of weight norm; writes a Hugging Face directory.
State dicts are in torch's layout, parameters {"encoder", "decoder", "codebooks" [K, V, D]}.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mert_jax.constants import HOP_LENGTH, SAMPLE_RATE
from mert_jax.errors import UserError
from mert_jax.files import atomic_write, write_json
from mert_jax.models import encodec
from mert_jax.teachers.fitted_file import differences
from mert_jax.tensors import state_dict

State = dict[str, np.ndarray]
# weight norm: length and direction of each kernel
LENGTH, DIRECTION = (f"parametrizations.weight.original{i}" for i in range(2))
LSTM = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
# every spelling to Hugging Face's newest
SPELLINGS = {
    r"^(encoder|decoder)\.model\.": r"\1.layers.",
    r"\.conv(tr)?\.conv(tr)?\.": ".conv.",
    r"^quantizer\.vq\.layers\.(\d+)\._codebook\.": r"quantizer.layers.\1.codebook.",
    r"\.weight_g$": f".{LENGTH}",
    r"\.weight_v$": f".{DIRECTION}",
}
# moving averages of training, and the decoder
UNUSED = re.compile(r"quantizer\.layers\.\d+\.codebook\.(inited|cluster_size|embed_avg)$|decoder\.")


def _layers(lstm: int, resample: str, first_block: int) -> dict[str, str]:
    """Our modules by their numbers in torch's list of layers, which counts activations."""
    numbers = {"conv_in": "0", "lstm_0": f"{lstm}", "lstm_1": f"{lstm}", "conv_out": "15"}
    for i in range(len(encodec.RATIOS)):
        block = first_block + 3 * i
        numbers |= {f"{resample}_{i}": f"{3 + 3 * i}", f"block_{i}/shortcut": f"{block}.shortcut"}
        numbers |= {f"block_{i}/conv{k}": f"{block}.block.{2 * k - 1}" for k in (1, 2)}
    return numbers


LAYERS = {"encoder": _layers(13, "down", 1), "decoder": _layers(1, "up", 4)}


def read_encodec(path: str) -> dict[str, Any]:
    """Return encoder and codebooks. Raises UserError for another rate, and for wrong tensors."""
    if not os.path.isdir(path):
        return from_state(state_dict.read_tensors(path), path)
    config = os.path.join(path, "config.json")
    if os.path.exists(config):
        rate = state_dict.read_json(config).get("sampling_rate", SAMPLE_RATE)
        if rate != SAMPLE_RATE:
            raise UserError(f"{path} is a codec for {rate} Hz; {SAMPLE_RATE} Hz is needed")
    return from_state(state_dict.read_tensor_folder(path), path)


def from_state(tensors: Mapping[str, np.ndarray], path: str = "the state dict") -> dict[str, Any]:
    """Return the parameters of a state dict, called `path` in errors; see `read_encodec`."""
    state = {}
    for name, x in tensors.items():
        for pattern, replacement in SPELLINGS.items():
            name = re.sub(pattern, replacement, name)
        if not UNUSED.match(name):
            state[name] = np.asarray(x, np.float32)
    filters = len(state.get(f"encoder.layers.0.conv.{DIRECTION}", range(32)))
    dim = len(state.get(f"encoder.layers.15.conv.{DIRECTION}", range(128)))
    num_codebooks = sum(name.endswith(".codebook.embed") for name in state)
    books = [f"quantizer.layers.{k}.codebook.embed" for k in range(num_codebooks or 1)]
    encoder = encodec.Encoder(filters, dim)
    params = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 640)))["params"]
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), params)
    shapes = {name: x.shape for name, x in _to_torch(zeros, "encoder").items()}
    shapes |= dict.fromkeys(books, (len(state.get(books[0], ())), dim))
    if wrong := differences(state, shapes):
        problem = f"{path} is not a complete 24 kHz EnCodec; {len(wrong)} tensors differ"
        raise UserError(f"{problem}: {'; '.join(wrong)}")
    codebooks = np.stack([state[name] for name in books])
    return {"encoder": _encoder_from_torch(state), "codebooks": codebooks}


def write_encodec(directory: str, params: Mapping[str, Any]) -> None:
    """Write a directory that `read_encodec` and transformers' `EncodecModel` load."""
    state = {}
    for k, book in enumerate(np.asarray(params["codebooks"])):
        name = f"quantizer.layers.{k}.codebook"
        state |= {f"{name}.embed": book, f"{name}.embed_avg": book}
        state |= {f"{name}.cluster_size": np.ones(len(book)), f"{name}.inited": np.ones(1)}
    for part in LAYERS:
        state |= _to_torch(params[part], part)
    num_codebooks, codebook_size, dim = params["codebooks"].shape
    bits = num_codebooks * np.log2(codebook_size)  # of a frame
    config = dict(
        model_type="encodec",
        architectures=["EncodecModel"],
        sampling_rate=SAMPLE_RATE,
        audio_channels=1,
        num_filters=len(state["encoder.layers.0.conv.bias"]),
        hidden_size=dim,
        codebook_dim=dim,
        codebook_size=codebook_size,
        upsampling_ratios=list(reversed(encodec.RATIOS)),
        # kbit/s, from which transformers computes the number of codebooks
        target_bandwidths=[bits * SAMPLE_RATE / HOP_LENGTH / 1000],
        normalize=False,
        torch_dtype="float32",
    )
    # the weights last: a directory without them is not taken for a codec
    write_json(os.path.join(directory, "config.json"), config)
    with atomic_write(os.path.join(directory, "model.safetensors"), replace=True) as path:
        arrays = {name: np.asarray(x, np.float32) for name, x in state.items()}
        state_dict.write_tensors(path, arrays, {"format": "pt"})


def _encoder_from_torch(state: State) -> dict[str, Any]:
    """Nested parameters of the encoder from torch's tensors, float32."""
    flat = {}
    for module, layer in LAYERS["encoder"].items():
        name = f"encoder.layers.{layer}"
        if module.startswith("lstm"):
            tensors = [state[f"{name}.lstm.{kind}_l{module[-1]}"] for kind in LSTM]
            flat[f"{module}/input/kernel"], flat[f"{module}/recurrent"] = (x.T for x in tensors[:2])
            flat[f"{module}/input/bias"] = sum(tensors[2:])
            continue
        direction = state[f"{name}.conv.{DIRECTION}"]
        norm = np.sqrt(np.sum(np.square(direction, dtype=np.float64), (1, 2), keepdims=True))
        kernel = (state[f"{name}.conv.{LENGTH}"] * direction / norm).astype(np.float32)
        flat[f"{module}/conv/kernel"] = kernel.T
        flat[f"{module}/conv/bias"] = state[f"{name}.conv.bias"]
    return traverse_util.unflatten_dict(flat, sep="/")


def _to_torch(params: Mapping[str, Any], part: str) -> State:
    """Torch's tensors of nested parameters of `part`."""
    state, flat = {}, traverse_util.flatten_dict(params, sep="/")
    for module, layer in LAYERS[part].items():
        name = f"{part}.layers.{layer}"
        if module.startswith("lstm"):
            bias = flat[f"{module}/input/bias"]
            kernels = flat[f"{module}/input/kernel"].T, flat[f"{module}/recurrent"].T
            for kind, x in zip(LSTM, (*kernels, bias, np.zeros_like(bias)), strict=True):
                state[f"{name}.lstm.{kind}_l{module[-1]}"] = x
            continue
        if module.startswith("up"):
            bias = flat[f"{module}/bias"]
            taps = [flat[f"{module}/{tap}/kernel"] for tap in ("now", "before")]
            kernel = np.concatenate([x.reshape(len(x), -1, len(bias)) for x in taps], 1)
            kernel = kernel.transpose(0, 2, 1)
        else:
            kernel, bias = flat[f"{module}/conv/kernel"].T, flat[f"{module}/conv/bias"]
        state[f"{name}.conv.{LENGTH}"] = np.sqrt(np.square(kernel).sum((1, 2), keepdims=True))
        state[f"{name}.conv.{DIRECTION}"] = kernel
        state[f"{name}.conv.bias"] = bias
    return state
