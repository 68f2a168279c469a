"""Names and layouts of the official checkpoints: fairseq and Hugging Face <-> our parameters.

State dicts hold numpy arrays in torch's layout. Our parameters are flax's tree, its encoder layers
stacked on the first axis; names of ours are written as paths, "encoder/layer_norm/scale".
"""

import ast
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from mert_jax.cli import UserError
from mert_jax.model import Head, Student

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
# tables of the CQT, 176 MB of every official checkpoint (the second is spelt so upstream)
BUFFERS = re.compile(r"spec_layer\.|cqt_kernels|lenghts")


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


def _to_state(params: Any, style: int) -> dict[str, np.ndarray]:
    flat = {path: np.asarray(x) for path, x in _flat(params).items()}
    return {
        name: _to_torch(path, flat[path] if layer is None else flat[path][layer])
        for name, (path, layer) in _names(flat, style).items()
    }


def _shapes(student: Student) -> dict[str, jax.ShapeDtypeStruct]:
    wave = jax.ShapeDtypeStruct((1, 4000), jnp.float32)  # any length will do
    return _flat(jax.eval_shape(student.init, jax.random.key(0), wave)["params"])


def _weight_norm(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
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


def _from_state(state: Mapping[str, np.ndarray], student: Student, style: int) -> Any:
    state = {name: x for name, x in _weight_norm(state).items() if not BUFFERS.search(name)}
    abstract = _shapes(student)
    shapes = {path: x.shape for path, x in abstract.items()}
    names = _names(abstract, style)
    problems = [f"missing {name}" for name in names if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in names]
    for name, (path, layer) in names.items():
        shape = shapes[path][1:] if layer is not None else shapes[path]
        expected = _to_torch(path, np.broadcast_to(np.float32(0), shape)).shape
        if name in state and state[name].shape != expected:
            problems.append(f"{name} is {list(state[name].shape)}, not {list(expected)}")
    if problems:
        raise UserError(f"the checkpoint is not this student's: {'; '.join(problems)}")
    pieces: dict[str, list[np.ndarray]] = {}
    for name, (path, layer) in names.items():
        shape = shapes[path][1:] if layer is not None else shapes[path]
        pieces.setdefault(path, []).append(_from_torch(path, state[name], shape))
    flat = {
        path: np.stack(xs) if path.startswith("encoder/layers/") else xs[0]
        for path, xs in pieces.items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def params_from_fairseq(state: Mapping[str, np.ndarray], student: Student) -> Any:
    """Parameters of `student`, float32, from fairseq's model state; the CQT's tables are left out.

    Raises UserError listing every tensor that is missing, unexpected or of another shape.
    """
    return _from_state(state, student, FAIRSEQ)


def params_to_fairseq(params: Any) -> dict[str, np.ndarray]:
    """fairseq's names and layouts of `params`, or of their gradients.

    Raises UserError when two teachers' heads would share a name: fairseq has one of codes and one
    of the CQT.
    """
    return _to_state(params, FAIRSEQ)


def params_from_hf(state: Mapping[str, np.ndarray], student: Student) -> Any:
    """Parameters of `student`, float32, from a Hugging Face state with either weight norm's names.

    Raises UserError listing every tensor that is missing, unexpected or of another shape.
    """
    return _from_state(state, student, HF)


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


def conv_layers(text: str) -> list[tuple[int, int, int]]:
    """fairseq's `conv_feature_layers`, such as "[(512,10,5)] + [(512,3,2)] * 4", as a list of
    (channels, kernel, stride). Only lists, sums and repetitions are understood."""

    def value(node: ast.AST) -> Any:
        match node:
            case ast.BinOp(left, ast.Add(), right):
                return value(left) + value(right)
            case ast.BinOp(left, ast.Mult(), right):
                return value(left) * value(right)
            case ast.List() | ast.Tuple() | ast.Constant():
                return ast.literal_eval(node)
        raise UserError(f"conv_feature_layers is not understood: {text!r}")

    return [tuple(layer) for layer in value(ast.parse(text, mode="eval").body)]


def _one_width(channels: Any) -> int:
    if len(set(channels)) != 1:
        raise UserError(f"conv layers of different widths are not supported: {list(channels)}")
    return channels[0]


def student_from_fairseq(config: Mapping[str, Any], state: Mapping[str, np.ndarray]) -> Student:
    """The student of a fairseq checkpoint, without dropout: widths from the tensors' shapes, what
    they do not tell from the `config` of its model. Its heads are called rvq_vae and cqt."""
    state = _weight_norm(state)
    default = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
    channels, kernels, strides = zip(
        *conv_layers(config.get("conv_feature_layers", default)), strict=True
    )
    heads, options = [], {}
    if "label_embs_concat" in state:
        rows, final_dim = state["label_embs_concat"].shape
        books = state["final_proj.weight"].shape[0] // final_dim
        heads.append(Head("rvq_vae", rows // books, books))
        options["final_dim"] = final_dim
    if "encoder_cqt_model.fc.weight" in state:
        heads.append(Head("cqt", state["encoder_cqt_model.fc.weight"].shape[0]))
    width, width_per_group, kernel = state["encoder.pos_conv.0.weight_v"].shape
    return Student(
        conv_dim=_one_width(channels),
        conv_kernels=kernels,
        conv_strides=strides,
        hidden_size=width,
        num_layers=sum(name.endswith(".fc1.weight") for name in state),
        num_heads=config.get("encoder_attention_heads", 12),
        intermediate_size=state["encoder.layers.0.fc1.weight"].shape[0],
        pre_norm=config.get("layer_norm_first", False),
        heads=tuple(heads),
        pos_conv_kernel=kernel,
        pos_conv_groups=width // width_per_group,
        feature_grad_mult=config.get("feature_grad_mult", 1.0),
        **options,
    )


def student_from_hf(config: Mapping[str, Any]) -> Student:
    """The student of a Hugging Face MERT's `config.json`, without dropout and without heads.

    Raises UserError for settings that no MERT has and this student lacks.
    """
    only = dict(
        feat_extract_norm="group",
        feat_extract_activation="gelu",
        hidden_act="gelu",
        conv_bias=False,
        layer_norm_eps=1e-5,
        deepnorm=False,
        conv_pos_batch_norm=False,
    )
    if wrong := [
        f"{key}={config[key]!r}" for key in only if config.get(key, only[key]) != only[key]
    ]:
        raise UserError(f"not a MERT this program knows: {', '.join(wrong)}")
    return Student(
        conv_dim=_one_width(config["conv_dim"]),
        conv_kernels=tuple(config["conv_kernel"]),
        conv_strides=tuple(config["conv_stride"]),
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        intermediate_size=config["intermediate_size"],
        pre_norm=config["do_stable_layer_norm"],
        project_equal_widths=True,
        pos_conv_kernel=config["num_conv_pos_embeddings"],
        pos_conv_groups=config["num_conv_pos_embedding_groups"],
    )
