"""EnCodec's checkpoints <-> the parameters of `codec.py`, by name and layout.

Read are the official state dict (`encodec_24khz-*.th`), a Hugging Face directory or its weights
file, in any spelling of weight norm; written is Hugging Face's. State dicts hold numpy arrays in
torch's layout, parameters are {"encoder", "decoder", "codebooks" [K, V, d]}, flat inside.
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

from mert_jax.constants import HOP_LENGTH
from mert_jax.errors import UserError
from mert_jax.models import encodec
from mert_jax.tensors import state_dict

State = dict[str, np.ndarray]
SAMPLE_RATE = 24_000
# official name: Hugging Face's, and one spelling of weight norm
SPELLINGS = {
    r"^(encoder|decoder)\.model\.": r"\1.layers.",
    r"\.conv\.conv\.": ".conv.",
    r"\.convtr\.convtr\.": ".conv.",
    r"^quantizer\.vq\.layers\.(\d+)\._codebook\.": r"quantizer.layers.\1.codebook.",
    r"\.parametrizations\.weight\.original0$": ".weight_g",
    r"\.parametrizations\.weight\.original1$": ".weight_v",
}
# what training by moving averages leaves in a file, and encoding has no use for
UNUSED = re.compile(r"quantizer\.layers\.\d+\.codebook\.(inited|cluster_size|embed_avg)$")
STAGES = range(len(encodec.RATIOS))


def _block(i: int, number: int) -> dict[str, str]:
    names = {"conv1": "block.1", "conv2": "block.3", "shortcut": "shortcut"}
    return {f"block_{i}/{ours}": f"{number}.{theirs}" for ours, theirs in names.items()}


# our modules: the numbers of torch's list of layers, activations counted
LAYERS = {
    "encoder": {"conv_in": "0", "conv_out": "15", "lstm": "13"}
    | {ours: name for i in STAGES for ours, name in _block(i, 1 + 3 * i).items()}
    | {f"down_{i}": f"{3 + 3 * i}" for i in STAGES},
    "decoder": {"conv_in": "0", "conv_out": "15", "lstm": "1"}
    | {ours: name for i in STAGES for ours, name in _block(i, 4 + 3 * i).items()}
    | {f"up_{i}": f"{3 + 3 * i}" for i in STAGES},
}


def read_encodec(path: str) -> dict[str, Any]:
    """The parameters in an EnCodec checkpoint, `decoder` only where it is whole.

    Raises UserError for a file that cannot be read, for the 32 kHz and 48 kHz models, and with all
    names of tensors that are missing, unexpected or of another shape.
    """
    if os.path.isdir(path):
        config = os.path.join(path, "config.json")
        if os.path.exists(config):
            rate = state_dict.read_json(config).get("sampling_rate", SAMPLE_RATE)
            if rate != SAMPLE_RATE:
                raise UserError(f"{path} is a codec for {rate} Hz; {SAMPLE_RATE} Hz is needed")
        return from_state(state_dict.read_tensor_folder(path), path)
    return from_state(state_dict.read_tensors(path), path)


def from_state(state: Mapping[str, np.ndarray], path: str = "the state dict") -> dict[str, Any]:
    """The parameters of a state dict; errors as in `read`, where `path` is its name."""
    state = {_spelled(name): np.asarray(x) for name, x in state.items()}
    _check_kind(state, path)
    first, last = (state.get(f"encoder.layers.{i}.conv.weight_v") for i in (0, 15))
    filters = 32 if first is None else first.shape[0]
    dim = 128 if last is None else last.shape[0]
    books = sorted(
        (int(found[1]), name)
        for name in state
        if (found := re.fullmatch(r"quantizer\.layers\.(\d+)\.codebook\.embed", name))
    )
    size = state[books[0][1]].shape[0] if books else 0
    shapes = _shapes("encoder", encodec.Encoder(filters, dim), jnp.zeros((1, 640)))
    shapes |= {f"quantizer.layers.{k}.codebook.embed": (size, dim) for k in range(len(books) or 1)}
    decoder = _shapes("decoder", encodec.Decoder(filters), jnp.zeros((1, 8, dim)))
    with_decoder = set(decoder) <= set(state)
    shapes |= decoder if with_decoder else {}
    missing = sorted(set(shapes) - set(state))
    unexpected = sorted(
        name
        for name in set(state) - set(shapes)
        if not UNUSED.match(name) and not name.startswith("decoder.")
    )
    misshaped = [
        f"{name} {state[name].shape} instead of {shape}"
        for name, shape in sorted(shapes.items())
        if name in state and state[name].shape != shape
    ]
    if missing or unexpected or misshaped:
        raise UserError(
            f"{path} is no whole 24 kHz EnCodec: {len(missing)} tensors missing "
            f"({', '.join(missing) or 'none'}), {len(unexpected)} unexpected "
            f"({', '.join(unexpected) or 'none'}), {len(misshaped)} of another shape "
            f"({', '.join(misshaped) or 'none'})"
        )
    params = {
        "encoder": _from_torch(state, "encoder"),
        "codebooks": np.stack([state[name] for _, name in books]).astype(np.float32),
    }
    return params | ({"decoder": _from_torch(state, "decoder")} if with_decoder else {})


def write_encodec(directory: str, params: Mapping[str, Any]) -> None:
    """Write a directory that `transformers.EncodecModel.from_pretrained` and `read` load."""
    state = {
        f"quantizer.layers.{k}.codebook.{name}": x
        for k, book in enumerate(np.asarray(params["codebooks"]))
        for name, x in dict(
            embed=book, embed_avg=book, cluster_size=np.ones(len(book)), inited=np.ones(1)
        ).items()
    }
    for part in LAYERS:
        state |= _to_torch(traverse_util.flatten_dict(params[part], sep="/"), part)
    state = {
        name.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): np.asarray(x, np.float32)
        for name, x in state.items()
    }
    books, size, dim = params["codebooks"].shape
    config = dict(
        model_type="encodec",
        architectures=["EncodecModel"],
        sampling_rate=SAMPLE_RATE,
        audio_channels=1,
        num_filters=state["encoder.layers.0.conv.bias"].shape[0],
        hidden_size=dim,
        codebook_dim=dim,
        codebook_size=size,
        upsampling_ratios=list(reversed(encodec.RATIOS)),
        # what makes transformers count as many books as there are
        target_bandwidths=[books * np.log2(size) * SAMPLE_RATE / HOP_LENGTH / 1000],
        normalize=False,
        torch_dtype="float32",
    )
    os.makedirs(directory, exist_ok=True)
    # the weights last, and at once: a directory without them is no codec
    with open(os.path.join(directory, "config.json"), "w") as f:
        json.dump(config, f, indent=1)
    path = os.path.join(directory, "model.safetensors")
    state_dict.write_tensors(f"{path}.tmp", state, {"format": "pt"})
    os.replace(f"{path}.tmp", path)


def _spelled(name: str) -> str:
    for pattern, to in SPELLINGS.items():
        name = re.sub(pattern, to, name)
    return name


def _check_kind(state: State, path: str) -> None:
    first = [x for name, x in state.items() if name.startswith("encoder.layers.0.conv.weight")]
    if any(x.ndim == 3 and x.shape[1] == 2 for x in first):
        raise UserError(f"{path} is a stereo codec, the 48 kHz EnCodec; the 24 kHz one is needed")
    kernels = [state.get(f"encoder.layers.{3 + 3 * i}.conv.weight_v") for i in STAGES]
    if all(x is not None and x.ndim == 3 for x in kernels):
        hop = int(np.prod([x.shape[2] // 2 for x in kernels]))
        if hop != HOP_LENGTH:
            raise UserError(
                f"{path} is a codec of {hop} samples a frame (the 32 kHz EnCodec has 640); the "
                f"24 kHz one has {HOP_LENGTH}"
            )


def _shapes(part: str, module: Any, example: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the torch tensors of a module's parameters."""
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), example)["params"])
    nothing = {
        path: np.broadcast_to(np.float32(0), x.shape)
        for path, x in traverse_util.flatten_dict(params, sep="/").items()
    }
    return {name: x.shape for name, x in _to_torch(nothing, part).items()}


def _from_torch(state: State, part: str) -> dict[str, Any]:
    """Our nested parameters of `part`."""
    flat = {}
    for module, layer in LAYERS[part].items():
        name = f"{part}.layers.{layer}"
        get = lambda leaf, name=name: np.asarray(state[f"{name}.{leaf}"], np.float32)
        if module == "lstm":
            for i in range(2):
                flat[f"lstm_{i}/input/kernel"] = get(f"lstm.weight_ih_l{i}").T
                flat[f"lstm_{i}/input/bias"] = get(f"lstm.bias_ih_l{i}") + get(f"lstm.bias_hh_l{i}")
                flat[f"lstm_{i}/recurrent"] = get(f"lstm.weight_hh_l{i}").T
            continue
        direction = get("conv.weight_v")
        norm = np.sqrt(np.sum(np.square(direction, dtype=np.float64), (1, 2), keepdims=True))
        kernel = (get("conv.weight_g") * direction / norm).astype(np.float32)
        if module.startswith("up"):  # [in, out, 2 * ratio]
            now, before = np.split(kernel.transpose(0, 2, 1), 2, axis=1)
            flat[f"{module}/now/kernel"] = now.reshape(len(kernel), -1)
            flat[f"{module}/before/kernel"] = before.reshape(len(kernel), -1)
            flat[f"{module}/bias"] = get("conv.bias")
        else:
            flat[f"{module}/conv/kernel"] = kernel.T
            flat[f"{module}/conv/bias"] = get("conv.bias")
    return traverse_util.unflatten_dict(flat, sep="/")


def _to_torch(flat: Mapping[str, np.ndarray], part: str) -> State:
    """The torch tensors of our flat parameters of `part`, weight norm as weight_g and weight_v."""
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
            taps = [flat[f"{module}/{name}/kernel"] for name in ("now", "before")]
            kernel = np.concatenate([x.reshape(len(x), -1, len(bias)) for x in taps], 1)
            kernel = kernel.transpose(0, 2, 1)
        else:
            kernel, bias = flat[f"{module}/conv/kernel"].T, flat[f"{module}/conv/bias"]
        state[f"{name}.conv.weight_g"] = np.sqrt(np.square(kernel).sum((1, 2), keepdims=True))
        state[f"{name}.conv.weight_v"] = kernel
        state[f"{name}.conv.bias"] = bias
    return state
