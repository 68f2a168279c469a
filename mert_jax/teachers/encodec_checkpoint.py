"""EnCodec checkpoints to and from the parameters of `models/encodec.py`, by name and layout.

Reads the official state dict (`encodec_24khz-*.th`) and a Hugging Face directory or its weights
file, in each spelling of weight norm; writes a Hugging Face directory. State dicts hold numpy
arrays in torch's layout; parameters are {"encoder", "decoder", "codebooks" [K, V, D]}.
"""

import json
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
from mert_jax.files import atomic_write
from mert_jax.models import encodec
from mert_jax.tensors import state_dict

State = dict[str, np.ndarray]
# every spelling to Hugging Face's names with weight_g and weight_v
SPELLINGS = {
    r"^(encoder|decoder)\.model\.": r"\1.layers.",
    r"\.conv(tr)?\.conv(tr)?\.": ".conv.",
    r"^quantizer\.vq\.layers\.(\d+)\._codebook\.": r"quantizer.layers.\1.codebook.",
    r"\.parametrizations\.weight\.original0$": ".weight_g",
    r"\.parametrizations\.weight\.original1$": ".weight_v",
}
BOOK = re.compile(r"quantizer\.layers\.(\d+)\.codebook\.embed")
# moving averages of training, and a decoder that is not complete
UNUSED = re.compile(r"quantizer\.layers\.\d+\.codebook\.(inited|cluster_size|embed_avg)$|decoder\.")
STAGES = range(len(encodec.RATIOS))


def _layers(lstm: int, resample: str, first_block: int) -> dict[str, str]:
    """Our modules by their numbers in torch's list of layers, which counts activations."""
    numbers = {"conv_in": "0", "lstm": f"{lstm}", "conv_out": "15"}
    for i in STAGES:
        block = f"{first_block + 3 * i}"
        numbers |= {
            f"{resample}_{i}": f"{3 + 3 * i}",
            f"block_{i}/conv1": f"{block}.block.1",
            f"block_{i}/conv2": f"{block}.block.3",
            f"block_{i}/shortcut": f"{block}.shortcut",
        }
    return numbers


LAYERS = {"encoder": _layers(13, "down", 1), "decoder": _layers(1, "up", 4)}


def read_encodec(path: str) -> dict[str, Any]:
    """Return the parameters in an EnCodec checkpoint, with `decoder` only if it is complete.

    Raises UserError for a file that cannot be read, for the 32 kHz and 48 kHz models, and for
    tensors that are missing, unexpected or of another shape, naming all of them.
    """
    if not os.path.isdir(path):
        return from_state(state_dict.read_tensors(path), path)
    config = os.path.join(path, "config.json")
    if os.path.exists(config):
        rate = state_dict.read_json(config).get("sampling_rate", SAMPLE_RATE)
        if rate != SAMPLE_RATE:
            raise UserError(f"{path} is a codec for {rate} Hz; {SAMPLE_RATE} Hz is needed")
    return from_state(state_dict.read_tensor_folder(path), path)


def from_state(state: Mapping[str, np.ndarray], path: str = "the state dict") -> dict[str, Any]:
    """Return the parameters of a state dict, called `path` in errors; see `read_encodec`."""
    state = {_common_name(name): np.asarray(x, np.float32) for name, x in state.items()}
    _check_kind(state, path)
    conv_in, conv_out = (state.get(f"encoder.layers.{i}.conv.weight_v") for i in (0, 15))
    filters = 32 if conv_in is None else conv_in.shape[0]
    dim = 128 if conv_out is None else conv_out.shape[0]
    books = sorted(filter(BOOK.fullmatch, state), key=lambda name: int(BOOK.match(name)[1]))
    size = state[books[0]].shape[0] if books else 0
    shapes = _shapes("encoder", encodec.Encoder(filters, dim), jnp.zeros((1, 640)))
    shapes |= {f"quantizer.layers.{k}.codebook.embed": (size, dim) for k in range(len(books) or 1)}
    decoder = _shapes("decoder", encodec.Decoder(filters), jnp.zeros((1, 8, dim)))
    with_decoder = set(decoder) <= set(state)
    shapes |= decoder if with_decoder else {}
    _check_shapes(state, shapes, path)
    params = {
        "encoder": _from_torch(state, "encoder"),
        "codebooks": np.stack([state[name] for name in books]),
    }
    return params | ({"decoder": _from_torch(state, "decoder")} if with_decoder else {})


def write_encodec(directory: str, params: Mapping[str, Any]) -> None:
    """Write a directory that `transformers.EncodecModel.from_pretrained` and `read_encodec` load.

    Raises UserError if it cannot be written.
    """
    state = {}
    for k, book in enumerate(np.asarray(params["codebooks"])):
        name = f"quantizer.layers.{k}.codebook"
        state |= {f"{name}.embed": book, f"{name}.embed_avg": book}
        state |= {f"{name}.cluster_size": np.ones(len(book)), f"{name}.inited": np.ones(1)}
    for part in LAYERS:
        state |= _to_torch(traverse_util.flatten_dict(params[part], sep="/"), part)
    spellings = {"weight_g": "weight.original0", "weight_v": "weight.original1"}
    for short, name in spellings.items():
        state = {k.replace(short, f"parametrizations.{name}"): x for k, x in state.items()}
    num_codebooks, codebook_size, dim = params["codebooks"].shape
    config = dict(
        model_type="encodec",
        architectures=["EncodecModel"],
        sampling_rate=SAMPLE_RATE,
        audio_channels=1,
        num_filters=state["encoder.layers.0.conv.bias"].shape[0],
        hidden_size=dim,
        codebook_dim=dim,
        codebook_size=codebook_size,
        upsampling_ratios=list(reversed(encodec.RATIOS)),
        # kbit/s, from which transformers computes the number of codebooks
        target_bandwidths=[
            num_codebooks * np.log2(codebook_size) * SAMPLE_RATE / HOP_LENGTH / 1000
        ],
        normalize=False,
        torch_dtype="float32",
    )
    # the weights last: a directory without them is not taken for a codec
    config_file = os.path.join(directory, "config.json")
    with atomic_write(config_file, replace=True) as path, open(path, "w") as file:
        json.dump(config, file, indent=1)
    with atomic_write(os.path.join(directory, "model.safetensors"), replace=True) as path:
        arrays = {name: np.asarray(x, np.float32) for name, x in state.items()}
        state_dict.write_tensors(path, arrays, {"format": "pt"})


def _common_name(name: str) -> str:
    for pattern, replacement in SPELLINGS.items():
        name = re.sub(pattern, replacement, name)
    return name


def _check_kind(state: State, path: str) -> None:
    conv_in = [x for name, x in state.items() if name.startswith("encoder.layers.0.conv.weight")]
    if any(x.ndim == 3 and x.shape[1] == 2 for x in conv_in):
        raise UserError(f"{path} is a stereo codec, the 48 kHz EnCodec; the 24 kHz one is needed")
    kernels = [state.get(f"encoder.layers.{3 + 3 * i}.conv.weight_v") for i in STAGES]
    if all(x is not None and x.ndim == 3 for x in kernels):
        hop = int(np.prod([x.shape[2] // 2 for x in kernels]))
        if hop != HOP_LENGTH:
            raise UserError(
                f"{path} is a codec of {hop} samples a frame (the 32 kHz EnCodec has 640); the "
                f"24 kHz one has {HOP_LENGTH}"
            )


def _check_shapes(state: State, shapes: Mapping[str, tuple[int, ...]], path: str) -> None:
    missing = sorted(set(shapes) - set(state))
    unexpected = sorted(name for name in set(state) - set(shapes) if not UNUSED.match(name))
    misshaped = [
        f"{name} {state[name].shape} instead of {shape}"
        for name, shape in sorted(shapes.items())
        if name in state and state[name].shape != shape
    ]
    if missing or unexpected or misshaped:
        raise UserError(
            f"{path} is not a complete 24 kHz EnCodec: {len(missing)} tensors missing "
            f"({', '.join(missing) or 'none'}), {len(unexpected)} unexpected "
            f"({', '.join(unexpected) or 'none'}), {len(misshaped)} of another shape "
            f"({', '.join(misshaped) or 'none'})"
        )


def _shapes(part: str, module: Any, example: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the torch tensors of a module's parameters."""
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), example)["params"])
    flat = traverse_util.flatten_dict(params, sep="/")
    zeros = {path: np.broadcast_to(np.float32(0), x.shape) for path, x in flat.items()}
    return {name: x.shape for name, x in _to_torch(zeros, part).items()}


def _from_torch(state: State, part: str) -> dict[str, Any]:
    """Nested parameters of `part` from torch's tensors, float32."""
    flat = {}
    for module, layer in LAYERS[part].items():
        name = f"{part}.layers.{layer}"
        if module == "lstm":
            for i in range(2):
                bias = state[f"{name}.lstm.bias_ih_l{i}"] + state[f"{name}.lstm.bias_hh_l{i}"]
                flat[f"lstm_{i}/input/kernel"] = state[f"{name}.lstm.weight_ih_l{i}"].T
                flat[f"lstm_{i}/input/bias"] = bias
                flat[f"lstm_{i}/recurrent"] = state[f"{name}.lstm.weight_hh_l{i}"].T
            continue
        direction, bias = state[f"{name}.conv.weight_v"], state[f"{name}.conv.bias"]
        norm = np.sqrt(np.sum(np.square(direction, dtype=np.float64), (1, 2), keepdims=True))
        kernel = (state[f"{name}.conv.weight_g"] * direction / norm).astype(np.float32)
        if module.startswith("up"):  # [in, out, 2 * ratio]
            now, before = np.split(kernel.transpose(0, 2, 1), 2, axis=1)
            flat[f"{module}/now/kernel"] = now.reshape(len(kernel), -1)
            flat[f"{module}/before/kernel"] = before.reshape(len(kernel), -1)
            flat[f"{module}/bias"] = bias
        else:
            flat[f"{module}/conv/kernel"], flat[f"{module}/conv/bias"] = kernel.T, bias
    return traverse_util.unflatten_dict(flat, sep="/")


def _to_torch(flat: Mapping[str, np.ndarray], part: str) -> State:
    """Torch's tensors of flat parameters of `part`, weight norm as weight_g and weight_v."""
    state = {}
    for module, layer in LAYERS[part].items():
        name = f"{part}.layers.{layer}"
        if module == "lstm":
            for i in range(2):
                bias = flat[f"lstm_{i}/input/bias"]
                state[f"{name}.lstm.weight_ih_l{i}"] = flat[f"lstm_{i}/input/kernel"].T
                state[f"{name}.lstm.weight_hh_l{i}"] = flat[f"lstm_{i}/recurrent"].T
                state[f"{name}.lstm.bias_ih_l{i}"] = bias
                state[f"{name}.lstm.bias_hh_l{i}"] = np.zeros_like(bias)
            continue
        if module.startswith("up"):
            bias = flat[f"{module}/bias"]
            taps = [flat[f"{module}/{tap}/kernel"] for tap in ("now", "before")]
            kernel = np.concatenate([x.reshape(len(x), -1, len(bias)) for x in taps], 1)
            kernel = kernel.transpose(0, 2, 1)
        else:
            kernel, bias = flat[f"{module}/conv/kernel"].T, flat[f"{module}/conv/bias"]
        state[f"{name}.conv.weight_g"] = np.sqrt(np.square(kernel).sum((1, 2), keepdims=True))
        state[f"{name}.conv.weight_v"] = kernel
        state[f"{name}.conv.bias"] = bias
    return state
