"""Names and layouts of tensors: fairseq's and Hugging Face's <-> our parameters.

State dicts hold numpy arrays in torch's layout. Our parameters are flax's tree, its encoder layers
stacked on the first axis; names of ours are written as paths, "encoder/layer_norm/scale".
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import linen as nn
from flax import traverse_util

from mert_jax.errors import UserError
from mert_jax.models.mert_v1 import Student

FAIRSEQ, HF = 0, 1
# our module: fairseq's, Hugging Face's; {} is a conv layer's or an encoder layer's number
MODULES = {
    "feature_encoder/conv_layers_{}": (
        "feature_extractor.conv_layers.{}.0",
        "feature_extractor.conv_layers.{}.conv",
    ),
    "feature_encoder/layer_norm": (
        "feature_extractor.conv_layers.0.2",
        "feature_extractor.conv_layers.0.layer_norm",
    ),
    "feature_projection/layer_norm": ("layer_norm", "feature_projection.layer_norm"),
    "feature_projection/projection": ("post_extract_proj", "feature_projection.projection"),
    "encoder/pos_conv_embed": ("encoder.pos_conv.0", "encoder.pos_conv_embed.conv"),
    "encoder/layer_norm": ("encoder.layer_norm", "encoder.layer_norm"),
    **{
        f"encoder/layers/attention/{name}": (
            f"encoder.layers.{{}}.self_attn.{name}",
            f"encoder.layers.{{}}.attention.{name}",
        )
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    },
    "encoder/layers/layer_norm": (
        "encoder.layers.{}.self_attn_layer_norm",
        "encoder.layers.{}.layer_norm",
    ),
    "encoder/layers/intermediate_dense": (
        "encoder.layers.{}.fc1",
        "encoder.layers.{}.feed_forward.intermediate_dense",
    ),
    "encoder/layers/output_dense": (
        "encoder.layers.{}.fc2",
        "encoder.layers.{}.feed_forward.output_dense",
    ),
    "encoder/layers/final_layer_norm": (
        "encoder.layers.{}.final_layer_norm",
        "encoder.layers.{}.final_layer_norm",
    ),
}
TENSORS = {"kernel": "weight", "scale": "weight"}  # the other names are the same
PARAMETRIZED = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}
# tables of the CQT, 176 MB of every official checkpoint (the last is spelt so upstream)
BUFFERS = re.compile(r"spec_layer\.|cqt_kernels|lenghts")
# fairseq's tensors come in the order of its modules, and its flat moments in that of its tensors
ORDER = (
    *("mask_emb", "label_embs_concat", "feature_extractor", "post_extract_proj"),
    *("encoder.pos_conv", "encoder.layers", "encoder.layer_norm", "layer_norm", "final_proj"),
    *("encoder_cqt_model.spec_layer", "encoder_cqt_model.fc"),
)
LAYER_ORDER = (
    *("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj"),
    *("self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"),
)
# what a checkpoint's weights may be kept in
DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
LEAVES = ("weight", "bias", "weight_g", "weight_v")


def official_name(path: str, paths: set[str], style: int) -> str | None:
    """The tensor's name in `style`, {} where an encoder layer's number goes; None if it has none.

    `paths` are all of ours: a head with codebooks is fairseq's `final_proj`, one without its CQT
    head. Hugging Face has no heads.
    """
    if path == "masked_spec_embed":
        return ("mask_emb", path)[style]
    module, _, leaf = path.rpartition("/")
    if not module.startswith(("encoder", "feature")):
        if style == HF:
            return None
        if path.endswith("_codebooks"):
            return "label_embs_concat"
        books = module.removesuffix("_proj") + "_codebooks"
        module = "final_proj" if books in paths else "encoder_cqt_model.fc"
        return f"{module}.{TENSORS.get(leaf, leaf)}"
    for ours, names in MODULES.items():
        if found := re.fullmatch(ours.replace("{}", r"(\d+)"), module):
            name = names[style].format(*found.groups()) if found.groups() else names[style]
            return f"{name}.{TENSORS.get(leaf, leaf)}"
    raise UserError(f"parameter {path!r} has no name in the official checkpoints")


def _to_torch(path: str, x: np.ndarray) -> np.ndarray:
    if path.endswith(("kernel", "weight_v")):
        return x.T  # [in, out] -> [out, in] and [k, in, out] -> [out, in, k]
    if path.endswith("weight_g"):
        return x.reshape(1, 1, -1)
    return x.reshape(-1, x.shape[-1]) if path.endswith("_codebooks") else x


def _from_torch(path: str, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    x = np.asarray(x, np.float32)  # official files may be half precision
    return x.T if path.endswith(("kernel", "weight_v")) else x.reshape(shape)


def _names(params: Mapping[str, Any], style: int) -> dict[str, tuple[str, int | None]]:
    """Official name -> our path and, for a tensor of an encoder layer, the layer."""
    names: dict[str, tuple[str, int | None]] = {}
    for path, x in params.items():
        name = official_name(path, set(params), style)
        if name is None:
            continue
        stacked = path.startswith("encoder/layers/")
        new = {name.format(i): (path, i) for i in range(x.shape[0])} if stacked else {}
        new = new or {name: (path, None)}
        if twice := sorted(set(new) & set(names)):
            raise UserError(
                f"the official checkpoint has room for one {twice[0]}, and both "
                f"{names[twice[0]][0]} and {path} would take it; leave out one teacher's head"
            )
        names |= new
    return names


def _flat(params: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(nn.unbox(params), sep="/")


def fairseq_rank(name: str) -> tuple:
    """Sorts fairseq's names as its state dict has them."""
    part = next(i for i, prefix in enumerate(ORDER) if name.startswith(prefix))
    numbers = [int(x) for x in re.findall(r"\.(\d+)(?=\.)", name)]
    within = [i for i, module in enumerate(LAYER_ORDER) if f".{module}." in name]
    leaf = name.rpartition(".")[2]
    return part, numbers, within, LEAVES.index(leaf) if leaf in LEAVES else 0


def _to_state(params: Any, style: int) -> dict[str, np.ndarray]:
    flat = {path: np.asarray(x) for path, x in _flat(params).items()}
    return {
        name: _to_torch(path, flat[path] if layer is None else flat[path][layer])
        for name, (path, layer) in _names(flat, style).items()
    }


@functools.lru_cache(maxsize=8)  # asked for parameters, and again for each moment
def _abstract(student: Student) -> dict[str, jax.ShapeDtypeStruct]:
    wave = jax.ShapeDtypeStruct((1, 4000), jnp.float32)  # any length will do
    return _flat(jax.eval_shape(student.init, jax.random.key(0), wave)["params"])


def abstract(student: Student) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the student's parameters, by path; UserError for sizes that no student
    can have."""
    try:
        return dict(_abstract(student))
    except Exception as e:  # whatever the settings of a file make of shapes
        sizes = ("hidden_size", "num_layers", "num_heads", "pos_conv_kernel", "pos_conv_groups")
        given = ", ".join(f"{size}={getattr(student, size)!r}" for size in sizes)
        raise UserError(f"no student can have {given}: {str(e).splitlines()[0]}") from e


def weight_norm(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state with its weight norm spelt `weight_g`, `weight_v`, whichever of the three spellings
    it has: these, torch's parametrizations, or one folded `weight`."""
    renamed = {}
    for name, x in state.items():
        for new, old in PARAMETRIZED.items():
            name = name.removesuffix(new) + old if name.endswith("." + new) else name
        if re.fullmatch(r"encoder\.(pos_conv\.0|pos_conv_embed\.conv)\.weight", name):
            renamed[name + "_g"] = np.linalg.norm(np.float32(x), axis=(0, 1), keepdims=True)
            name += "_v"
        renamed[name] = x
    return renamed


def problems(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """List every tensor that is missing, unexpected, of another shape or not finite."""
    lines = [f"missing {name}" for name in shapes if name not in tensors]
    lines += [f"unexpected {name}" for name in tensors if name not in shapes]
    for name in (name for name in shapes if name in tensors):
        if tensors[name].shape != shapes[name]:
            lines.append(f"{name} is {list(tensors[name].shape)}, not {list(shapes[name])}")
        elif bad := np.count_nonzero(~np.isfinite(tensors[name])):
            lines.append(f"{name} has {bad} values that are not finite")
    return lines


def refuse(problems: list[str], path: str) -> None:
    """Raise UserError with all `problems` of the checkpoint `path`, if there are any."""
    if problems:
        raise UserError(
            f"{path}: {len(problems)} of its tensors are not as they should be: "
            f"{'; '.join(problems)}"
        )


def dtype_of(state: Mapping[str, np.ndarray]) -> str:
    """The dtype that all tensors of a state have, the CQT's tables left out; float32 where they
    differ, or where it is none of `DTYPES`."""
    found = {x.dtype.name for name, x in state.items() if not BUFFERS.search(name)}
    return found.pop() if len(found) == 1 and found <= set(DTYPES) else "float32"


def _from_state(
    state: Mapping[str, np.ndarray], student: Student, style: int, path: str = "the checkpoint"
) -> Any:
    state = {name: x for name, x in weight_norm(state).items() if not BUFFERS.search(name)}
    parameters = abstract(student)
    names = _names(parameters, style)
    shapes = {
        name: parameters[ours].shape[0 if layer is None else 1 :]
        for name, (ours, layer) in names.items()
    }
    expected = {
        name: _to_torch(names[name][0], np.broadcast_to(np.float32(0), shape)).shape
        for name, shape in shapes.items()
    }
    refuse(problems(state, expected), path)
    # the layers of a stacked parameter come in order, since `_names` lists them so
    layers: dict[str, list[np.ndarray]] = {}
    for name, (ours, _) in names.items():
        layers.setdefault(ours, []).append(_from_torch(ours, state[name], shapes[name]))
    flat = {
        ours: np.stack(xs) if ours.startswith("encoder/layers/") else xs[0]
        for ours, xs in layers.items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def params_from_fairseq(
    state: Mapping[str, np.ndarray], student: Student, path: str = "the checkpoint"
) -> Any:
    """Parameters of `student`, float32, from fairseq's model state; the CQT's tables are left out.

    Raises UserError listing every tensor that is missing, unexpected, of another shape or not
    finite.
    """
    return _from_state(state, student, FAIRSEQ, path)


def params_to_fairseq(params: Any) -> dict[str, np.ndarray]:
    """fairseq's names and layouts of `params`, or of their gradients, in fairseq's order.

    Raises UserError when two teachers' heads would share a name: fairseq has one of codes and one
    of the CQT.
    """
    state = _to_state(params, FAIRSEQ)
    return {name: state[name] for name in sorted(state, key=fairseq_rank)}


def params_from_hf(
    state: Mapping[str, np.ndarray], student: Student, path: str = "the checkpoint"
) -> Any:
    """Parameters of `student`, float32, from a Hugging Face state with either weight norm's names.

    Raises UserError listing every tensor that is missing, unexpected, of another shape or not
    finite.
    """
    return _from_state(state, student, HF, path)


def params_to_hf(params: Any) -> dict[str, np.ndarray]:
    """Hugging Face's names (weight norm as `weight_g`, `weight_v`, which every version of
    transformers loads) and layouts of `params`; heads have none and are left out.

    Equal widths, which fairseq does not project, get the identity.
    """
    state = _to_state(params, HF)
    width = state["feature_projection.layer_norm.weight"].shape[0]
    state.setdefault("feature_projection.projection.weight", np.eye(width, dtype=np.float32))
    state.setdefault("feature_projection.projection.bias", np.zeros(width, np.float32))
    return state
