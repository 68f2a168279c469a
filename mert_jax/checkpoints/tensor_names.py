"""Tensor names and layouts of fairseq and Hugging Face checkpoints, mapped to our parameters.

Ours are flax's tree, with paths such as "encoder/layer_norm/scale" and stacked encoder layers.
"""

import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from mert_jax.checkpoints.in_memory import architecture
from mert_jax.errors import UserError
from mert_jax.models.mert_v1 import Student

State = Mapping[str, np.ndarray]
FAIRSEQ, HF = 0, 1  # columns of the table
# substitutions that turn a path of ours, in this order, into an official name
RENAMES = (
    (r"^masked_spec_embed", "mask_emb", "masked_spec_embed"),
    (r"^feature_encoder/conv_layers_(\d+)", r"feature_encoder/\1/0", r"feature_encoder/\1/conv"),
    (r"^feature_encoder/layer_norm", "feature_encoder/0/2", "feature_encoder/0/layer_norm"),
    (r"^feature_encoder", "feature_extractor.conv_layers", "feature_extractor.conv_layers"),
    (r"^feature_projection/layer_norm", "layer_norm", "feature_projection.layer_norm"),
    (r"^feature_projection/projection", "post_extract_proj", "feature_projection.projection"),
    (r"^encoder/pos_conv_embed", "encoder.pos_conv.0", "encoder.pos_conv_embed.conv"),
    (r"layers/layer_norm", "layers/self_attn_layer_norm", "layers/layer_norm"),
    (r"layers/attention", "layers/self_attn", "layers/attention"),
    (r"intermediate_dense", "fc1", "feed_forward.intermediate_dense"),
    (r"output_dense", "fc2", "feed_forward.output_dense"),
    (r"^encoder/layers", "encoder.layers.{}", "encoder.layers.{}"),  # the number of the layer
    (r"(kernel|scale)$", "weight", "weight"),
    (r"/", ".", "."),
)
LAYERS = "encoder/layers/"
# tables of the CQT, 176 MB of every official checkpoint (the last is spelt so upstream)
BUFFERS = re.compile(r"spec_layer\.|cqt_kernels|lenghts")
# parts of fairseq's names in the order of its state dict, which its flat moments share
ORDER = (
    "mask_emb label_embs_concat feature_extractor conv_layers post_extract_proj encoder pos_conv "
    "layers self_attn k_proj v_proj q_proj out_proj self_attn_layer_norm fc1 fc2 final_layer_norm "
    "layer_norm final_proj encoder_cqt_model spec_layer fc lenghts cqt_kernels_real "
    "cqt_kernels_imag weight bias weight_g weight_v"
).split()
DTYPES = {name: np.dtype(name) for name in ("float32", "float16", "bfloat16")}  # of checkpoints


def official_name(path: str, paths: Collection[str], style: int) -> str | None:
    """Return the tensor's name in `style`, with {} for a layer's number; None for a head in HF.

    `paths` are all of ours: a head with codebooks is fairseq's `final_proj`, another its CQT head.
    """
    if not path.startswith(("encoder/", "feature_", "masked_spec_embed")):
        if style == HF:
            return None
        if path.endswith("_codebooks"):
            return "label_embs_concat"
        has_codes = re.sub("_proj/.*", "_codebooks", path) in paths
        path = re.sub(".*/", "final_proj/" if has_codes else "encoder_cqt_model/fc/", path)
    for pattern, *names in RENAMES:
        path = re.sub(pattern, names[style], path)
    return path


def fairseq_rank(name: str) -> list[int]:
    """Return a sort key that puts fairseq's names in the order of its state dict."""
    return [int(part) if part.isdecimal() else ORDER.index(part) for part in name.split(".")]


def _to_torch(path: str, x: np.ndarray) -> np.ndarray:
    if path.endswith(("kernel", "weight_v")):
        return x.T  # [in, out] -> [out, in] and [k, in, out] -> [out, in, k]
    if path.endswith("weight_g"):
        return x.reshape(1, 1, -1)
    return x.reshape(-1, x.shape[-1]) if path.endswith("_codebooks") else x


def _from_torch(path: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    x = np.asarray(x, np.float32)  # official files may be half precision
    return x.T if path.endswith(("kernel", "weight_v")) else x.reshape(shape)


def _to_state(params: Any, style: int) -> dict[str, np.ndarray]:
    flat = traverse_util.flatten_dict(nn.unbox(params), sep="/")
    state = {}
    for path, x in flat.items():
        layers = enumerate(x) if path.startswith(LAYERS) else [("", x)]
        if name := official_name(path, flat.keys(), style):
            state |= {name.format(i): _to_torch(path, np.asarray(layer)) for i, layer in layers}
    return state


def _from_state(
    state: State, student: Student, path: str = "the checkpoint", *, style: int
) -> dict[str, Any]:
    state = {name: x for name, x in weight_norm(state).items() if not BUFFERS.search(name)}
    shapes = {key: x.shape for key, x in abstract_params(student).items()}
    zeros = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    check_tensors(state, {name: x.shape for name, x in _to_state(zeros, style).items()}, path)
    flat = {}
    for key, shape in shapes.items():
        name = official_name(key, shapes.keys(), style)
        if key.startswith(LAYERS):
            layers = [state[name.format(i)] for i in range(shape[0])]
            flat[key] = np.stack([_from_torch(key, x, shape[1:]) for x in layers])
        elif name:
            flat[key] = _from_torch(key, state[name], shape)
    return traverse_util.unflatten_dict(flat, sep="/")


# (state, student, path) -> the float32 parameters of `student`; UserError as `check_tensors`
params_from_fairseq = functools.partial(_from_state, style=FAIRSEQ)
params_from_hf = functools.partial(_from_state, style=HF)


def params_to_fairseq(params: Any) -> dict[str, np.ndarray]:
    """Return `params`, with one head for codes and one for the CQT, as fairseq's ordered state."""
    state = _to_state(params, FAIRSEQ)
    return {name: state[name] for name in sorted(state, key=fairseq_rank)}


def params_to_hf(params: Any) -> dict[str, np.ndarray]:
    """Return `params` without heads as Hugging Face's state, which every version can load."""
    state = _to_state(params, HF)
    # fairseq does not project equal widths
    width = state["feature_projection.layer_norm.weight"].shape[0]
    state.setdefault("feature_projection.projection.weight", np.eye(width, dtype=np.float32))
    state.setdefault("feature_projection.projection.bias", np.zeros(width, np.float32))
    return state


def abstract_params(student: Student) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of the parameters by path. Raises UserError for impossible sizes."""
    try:
        wave = jax.ShapeDtypeStruct((1, 4000), jnp.float32)  # any length will do
        variables = jax.eval_shape(student.init, jax.random.key(0), wave)
    except Exception as e:  # the settings of a file can break any part of the model
        reason = str(e).splitlines()[0]
        raise UserError(f"no student can have {architecture(student)}: {reason}") from e
    return traverse_util.flatten_dict(nn.unbox(variables["params"]), sep="/")


def weight_norm(state: State) -> dict[str, np.ndarray]:
    """Return the state with torch's parametrizations of weight norm as `weight_g`, `weight_v`."""
    original = ".parametrizations.weight.original"
    spelt = {name: name.replace(f"{original}0", ".weight_g") for name in state}
    return {spelt[name].replace(f"{original}1", ".weight_v"): x for name, x in state.items()}


def check_tensors(tensors: State, shapes: Mapping[str, tuple[int, ...]], path: str) -> None:
    """Raise UserError listing every tensor that is missing, unexpected, misshapen or not finite."""
    lines = [f"missing {name}" for name in shapes if name not in tensors]
    lines += [f"unexpected {name}" for name in tensors if name not in shapes]
    for name in (name for name in shapes if name in tensors):
        if tensors[name].shape != shapes[name]:
            lines.append(f"{name} is {list(tensors[name].shape)}, not {list(shapes[name])}")
        elif bad := np.count_nonzero(~np.isfinite(tensors[name])):
            lines.append(f"{name} has {bad} values that are not finite")
    if lines:
        raise UserError(f"{path}: {len(lines)} tensors are wrong: {'; '.join(lines)}")


def dtype_of(state: State) -> str:
    """Return the dtype of all tensors but the CQT's tables; float32 if they differ."""
    names = {x.dtype.name for name, x in state.items() if not BUFFERS.search(name)}
    return names.pop() if len(names) == 1 and names <= DTYPES.keys() else "float32"
