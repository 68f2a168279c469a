"""Tensor names and layouts of fairseq and Hugging Face checkpoints, mapped to our parameters.

State dicts hold numpy arrays in torch's layout. Our parameters are flax's tree, with the encoder
layers stacked on the first axis; they are named by paths such as "encoder/layer_norm/scale".
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from mert_jax.errors import UserError
from mert_jax.models.mert_v1 import Student

State = Mapping[str, np.ndarray]
FAIRSEQ, HF = 0, 1  # columns of the tables
MODULES = {
    "feature_encoder/layer_norm": (
        "feature_extractor.conv_layers.0.2",
        "feature_extractor.conv_layers.0.layer_norm",
    ),
    "feature_projection/layer_norm": ("layer_norm", "feature_projection.layer_norm"),
    "feature_projection/projection": ("post_extract_proj", "feature_projection.projection"),
    "encoder/pos_conv_embed": ("encoder.pos_conv.0", "encoder.pos_conv_embed.conv"),
    "encoder/layer_norm": ("encoder.layer_norm", "encoder.layer_norm"),
}
# modules of one encoder layer, in the order of fairseq's state dict
LAYER_MODULES = {
    "attention/k_proj": ("self_attn.k_proj", "attention.k_proj"),
    "attention/v_proj": ("self_attn.v_proj", "attention.v_proj"),
    "attention/q_proj": ("self_attn.q_proj", "attention.q_proj"),
    "attention/out_proj": ("self_attn.out_proj", "attention.out_proj"),
    "layer_norm": ("self_attn_layer_norm", "layer_norm"),
    "intermediate_dense": ("fc1", "feed_forward.intermediate_dense"),
    "output_dense": ("fc2", "feed_forward.output_dense"),
    "final_layer_norm": ("final_layer_norm", "final_layer_norm"),
}
CONV, LAYERS = "feature_encoder/conv_layers_", "encoder/layers/"
LEAVES = {"kernel": "weight", "scale": "weight"}  # other leaves have the same name everywhere
# tables of the CQT, 176 MB of every official checkpoint (the last is spelt so upstream)
BUFFERS = re.compile(r"spec_layer\.|cqt_kernels|lenghts")
# order of fairseq's state dict, which its flat moments share
FAIRSEQ_ORDER = (
    *("mask_emb", "label_embs_concat", "feature_extractor", "post_extract_proj"),
    *("encoder.pos_conv", "encoder.layers", "encoder.layer_norm", "layer_norm", "final_proj"),
    *("encoder_cqt_model.spec_layer", "encoder_cqt_model.fc"),
)
LEAF_ORDER = ("weight", "bias", "weight_g", "weight_v")
DTYPES = {name: np.dtype(name) for name in ("float32", "float16", "bfloat16")}  # of checkpoints


def official_name(path: str, paths: Collection[str], style: int) -> str | None:
    """Return the tensor's name in `style`, with {} for the number of an encoder layer.

    `paths` are all of ours: a head with codebooks is fairseq's `final_proj`, one without its CQT
    head. Hugging Face has no heads: their name is None.
    """
    if path == "masked_spec_embed":
        return ("mask_emb", path)[style]
    module, _, leaf = path.rpartition("/")
    leaf = LEAVES.get(leaf, leaf)
    if module in MODULES:
        return f"{MODULES[module][style]}.{leaf}"
    if module.startswith(CONV):
        return f"feature_extractor.conv_layers.{module[len(CONV) :]}.{('0', 'conv')[style]}.{leaf}"
    if module.startswith(LAYERS) and module[len(LAYERS) :] in LAYER_MODULES:
        return f"encoder.layers.{{}}.{LAYER_MODULES[module[len(LAYERS) :]][style]}.{leaf}"
    if module.startswith(("encoder", "feature")):
        raise UserError(f"parameter {path!r} has no name in the official checkpoints")
    if style == HF:
        return None
    if path.endswith("_codebooks"):
        return "label_embs_concat"
    has_codes = module.removesuffix("_proj") + "_codebooks" in paths
    return f"{'final_proj' if has_codes else 'encoder_cqt_model.fc'}.{leaf}"


def fairseq_rank(name: str) -> tuple:
    """Return a sort key that puts fairseq's names in the order of its state dict."""
    part = next(i for i, prefix in enumerate(FAIRSEQ_ORDER) if name.startswith(prefix))
    numbers = [int(x) for x in re.findall(r"\.(\d+)(?=\.)", name)]
    modules = [i for i, (module, _) in enumerate(LAYER_MODULES.values()) if f".{module}." in name]
    leaf = name.rpartition(".")[2]
    return part, numbers, modules, LEAF_ORDER.index(leaf) if leaf in LEAF_ORDER else 0


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
    state, owners = {}, {}
    for path, x in flat.items():
        name = official_name(path, flat.keys(), style)
        if name is None:
            continue
        if name in owners:
            raise UserError(
                f"the official checkpoint has room for one {name}, and both {owners[name]} and "
                f"{path} would take it; leave out one teacher's head"
            )
        owners[name], x = path, np.asarray(x)
        if path.startswith(LAYERS):
            state |= {name.format(i): _to_torch(path, layer) for i, layer in enumerate(x)}
        else:
            state[name] = _to_torch(path, x)
    return state


def _from_state(state: State, student: Student, style: int, path: str) -> Any:
    state = {name: x for name, x in weight_norm(state).items() if not BUFFERS.search(name)}
    shapes = {key: x.shape for key, x in abstract_params(student).items()}
    zeros = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    expected = {name: x.shape for name, x in _to_state(zeros, style).items()}
    check_tensors(state, expected, path)
    flat = {}
    for key, shape in shapes.items():
        name = official_name(key, shapes.keys(), style)
        if key.startswith(LAYERS):
            layers = [state[name.format(i)] for i in range(shape[0])]
            flat[key] = np.stack([_from_torch(key, x, shape[1:]) for x in layers])
        elif name is not None:
            flat[key] = _from_torch(key, state[name], shape)
    return traverse_util.unflatten_dict(flat, sep="/")


def abstract_params(student: Student) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of the student's parameters, by path.

    Raises UserError for sizes that no student can have.
    """
    try:
        wave = jax.ShapeDtypeStruct((1, 4000), jnp.float32)  # any length will do
        variables = jax.eval_shape(student.init, jax.random.key(0), wave)
    except Exception as e:  # the settings of a file can break any part of the model
        sizes = ("hidden_size", "num_layers", "num_heads", "pos_conv_kernel", "pos_conv_groups")
        given = ", ".join(f"{size}={getattr(student, size)!r}" for size in sizes)
        raise UserError(f"no student can have {given}: {str(e).splitlines()[0]}") from e
    return traverse_util.flatten_dict(nn.unbox(variables["params"]), sep="/")


def weight_norm(state: State) -> dict[str, np.ndarray]:
    """Return the state with its weight norm as `weight_g` and `weight_v`.

    Torch's parametrizations are renamed, and one folded `weight` is its own `weight_v`.
    """
    renamed = {}
    for name, x in state.items():
        name = re.sub(r"\.parametrizations\.weight\.original0$", ".weight_g", name)
        name = re.sub(r"\.parametrizations\.weight\.original1$", ".weight_v", name)
        if re.fullmatch(r"encoder\.(pos_conv\.0|pos_conv_embed\.conv)\.weight", name):
            renamed[name + "_g"] = np.linalg.norm(np.float32(x), axis=(0, 1), keepdims=True)
            name += "_v"
        renamed[name] = x
    return renamed


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


def params_from_fairseq(state: State, student: Student, path: str = "the checkpoint") -> Any:
    """Return the float32 parameters of `student` from fairseq's model state.

    Raises UserError as `check_tensors` does, naming `path`.
    """
    return _from_state(state, student, FAIRSEQ, path)


def params_from_hf(state: State, student: Student, path: str = "the checkpoint") -> Any:
    """Return the float32 parameters of `student` from a Hugging Face state.

    Raises UserError as `check_tensors` does, naming `path`.
    """
    return _from_state(state, student, HF, path)


def params_to_fairseq(params: Any) -> dict[str, np.ndarray]:
    """Return `params`, or their gradients, in fairseq's names, layouts and order.

    Raises UserError if two heads need one name: fairseq has one for codes and one for the CQT.
    """
    state = _to_state(params, FAIRSEQ)
    return {name: state[name] for name in sorted(state, key=fairseq_rank)}


def params_to_hf(params: Any) -> dict[str, np.ndarray]:
    """Return `params` without heads in Hugging Face's names and layouts.

    Weight norm is `weight_g` and `weight_v`, which every version of transformers loads. Equal
    widths, which fairseq does not project, get the identity.
    """
    state = _to_state(params, HF)
    width = state["feature_projection.layer_norm.weight"].shape[0]
    state.setdefault("feature_projection.projection.weight", np.eye(width, dtype=np.float32))
    state.setdefault("feature_projection.projection.bias", np.zeros(width, np.float32))
    return state
