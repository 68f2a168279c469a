"""Small students of both flavours, and their checkpoints as fairseq and transformers write them."""

import json
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import numpy as np
from flax import traverse_util

from mert_jax.checkpoints import fairseq, tensor_names
from mert_jax.models import mert_v1
from mert_jax.tensors import state_dict, torch_pickle

HEADS = (mert_v1.Head("rvq_vae", 68, 2), mert_v1.Head("cqt", 14))
FLAVOURS = {"95m": dict(pre_norm=False), "330m": dict(pre_norm=True, num_layers=3, hidden_size=32)}
CONVS = "[(8,10,5)] + [(8,3,2)] * 1 + [(8,2,2)]"
GOLDEN = Path(__file__).parent / "golden"


def student(**options) -> mert_v1.Student:
    """A student of a few thousand parameters, with both heads."""
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
    return mert_v1.Student(**sizes | options)


def params_of(student: mert_v1.Student, seed: int = 0):
    """Random parameters; biases and norms too, so that a mix-up shows."""
    rng = np.random.default_rng(seed)
    flat = {
        name: rng.normal(size=x.shape).astype(np.float32)
        for name, x in tensor_names.abstract_params(student).items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def assert_same(a, b):
    """Assert that two trees have equal names, dtypes and values."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    jax.tree.map(
        lambda x, y: np.testing.assert_equal(np.asarray(x).dtype, np.asarray(y).dtype), a, b
    )


def pos_conv_kernel(params):
    """Return the kernel of the positional convolution that its weight norm stands for."""
    g, v = (params["encoder"]["pos_conv_embed"][name] for name in ("weight_g", "weight_v"))
    return v * (g / np.linalg.norm(v, axis=(1, 2))).reshape(-1, 1, 1)


# fairseq's files ---------------------------------------------------------------------------------


def settings(student: mert_v1.Student, convs: str = CONVS) -> dict:
    """Return the `cfg` of a fairseq file, as its trainer writes it."""
    model = dict(
        _name="mert",
        extractor_mode="default",
        conv_feature_layers=convs,
        encoder_layers=student.num_layers,
        encoder_embed_dim=student.hidden_size,
        encoder_ffn_embed_dim=student.intermediate_size,
        encoder_attention_heads=student.num_heads,
        layer_norm_first=student.pre_norm,
        conv_pos=student.pos_conv_kernel,
        conv_pos_groups=student.pos_conv_groups,
        final_dim=student.final_dim,
        untie_final_proj=True,
        latent_temp=(2.0, 0.5, 0.999995),
        audio_cqt_loss_m=True,
    )
    task = dict(_name="mert_pretraining", labels=["encodec_0", "encodec_1"], sample_rate=24_000)
    return {"_name": None, "common": {"fp16": True}, "model": model, "task": task}


def official_state(student: mert_v1.Student, dtype=np.float32, seed: int = 0) -> dict:
    """Return a random fairseq model state in `dtype`, with the CQT's tables."""
    state = tensor_names.params_to_fairseq(params_of(student, seed))
    state |= fairseq.cqt_tables(student.heads[-1].size)
    return {
        name: state[name].astype(dtype) for name in sorted(state, key=tensor_names.fairseq_rank)
    }


def moments(state: dict, flat: bool, step: int = 7) -> dict:
    """Return a float32 `last_optimizer_state`: one vector of all, or one for each parameter."""
    rng = np.random.default_rng(1)
    shapes = [x.shape for name, x in state.items() if "spec_layer" not in name]
    mu, nu = ([rng.normal(size=s).astype(np.float32) for s in shapes] for _ in range(2))
    nu = [x**2 for x in nu]
    if flat:
        mu, nu = ([np.concatenate([x.reshape(-1) for x in xs])] for xs in (mu, nu))
    entries = {
        i: {"step": step, "exp_avg": m, "exp_avg_sq": v}
        for i, (m, v) in enumerate(zip(mu, nu, strict=True))
    }
    last = {"state": entries, "param_groups": [{"lr": 5e-4, "params": list(entries)}]}
    return last | ({"loss_scale": 128.0} if flat else {})


def content(student: mert_v1.Student, state: dict, **changes) -> dict:
    """Return the content of a fairseq file; `checkpoints/fairseq.py` describes its layout."""
    history = {
        "criterion_name": "MertCriterion",
        "optimizer_name": "FP16Optimizer",
        "lr_scheduler_state": {"best": None},
        "num_updates": 7,
    }
    return {
        "args": None,
        "cfg": settings(student),
        "model": state,
        "criterion": {},
        "optimizer_history": [history | {"num_updates": 3}, history],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 2, "shuffle": True}, "best": 3.5},
        "last_optimizer_state": None,
    } | changes


class Object(NamedTuple):
    """An object in a pickle, of a class that is not installed."""

    module: str
    name: str
    attributes: dict


def write_with_objects(path, content) -> None:
    """Write content that may have `Object`s as `torch_pickle.write_pickle` does."""
    plain = torch_pickle._pickled

    def pickled(x, arrays):
        if not isinstance(x, Object):
            return plain(x, arrays)
        instance = f"c{x.module}\n{x.name}\n)".encode() + b"\x81"
        return instance + plain(x.attributes, arrays) + b"b"

    with mock.patch.object(torch_pickle, "_pickled", pickled):
        torch_pickle.write_pickle(path, content)


def dictionary(codes) -> Object:
    """Return a fairseq dictionary whose text file listed `codes` in this order."""
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *map(str, codes)]
    attributes = {"symbols": symbols, "indices": {s: i for i, s in enumerate(symbols)}}
    return Object("fairseq.data.dictionary", "Dictionary", attributes | {"nspecial": 4})


# Hugging Face's directories ----------------------------------------------------------------------

SPELLINGS = {
    "old": ("weight_g", "weight_v"),
    "new": ("parametrizations.weight.original0", "parametrizations.weight.original1"),
}


def respelt(state: dict, spelling: str) -> dict:
    """Return a Hugging Face state with its weight norm spelt in the `old` or `new` way."""
    conv = "encoder.pos_conv_embed.conv."
    g, v = state[f"{conv}weight_g"], state[f"{conv}weight_v"]
    rest = {name: x for name, x in state.items() if not name.startswith(f"{conv}weight")}
    return rest | {conv + name: x for name, x in zip(SPELLINGS[spelling], (g, v), strict=True)}


def hf_student(**options) -> mert_v1.Student:
    """Return a student without heads, as read from Hugging Face's files."""
    return student(heads=(), project_equal_widths=True, final_dim=64, **options)


def hf_state(student: mert_v1.Student, dtype=np.float32, seed: int = 0) -> dict:
    """Return a random Hugging Face state in `dtype`."""
    state = tensor_names.params_to_hf(params_of(student, seed))
    return {name: np.ascontiguousarray(x).astype(dtype) for name, x in state.items()}


def hf_config(student: mert_v1.Student) -> dict:
    """Return the official config.json of the student's flavour with its sizes."""
    size = "large" if student.pre_norm else "base"
    config = json.loads((GOLDEN / f"hf_{size}_config.json").read_text())
    layers = len(student.conv_kernels)
    return config | dict(
        conv_dim=[student.conv_dim] * layers,
        conv_kernel=list(student.conv_kernels),
        conv_stride=list(student.conv_strides),
        num_feat_extract_layers=layers,
        hidden_size=student.hidden_size,
        num_hidden_layers=student.num_layers,
        num_attention_heads=student.num_heads,
        intermediate_size=student.intermediate_size,
        num_conv_pos_embeddings=student.pos_conv_kernel,
        num_conv_pos_embedding_groups=student.pos_conv_groups,
    )


def hf_folder(folder: Path, student: mert_v1.Student, state: dict, file: str = state_dict.NAMES[0]):
    """Write a Hugging Face directory with `state` in `file`, and return its path."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(student)))
    if file.endswith(".bin"):
        torch_pickle.write_pickle(folder / file, state)
    else:
        state_dict.write_tensors(folder / file, state, {"format": "pt"})
    return str(folder)


def same_state(a: dict, b: dict):
    """Assert equal names in equal order, and equal shapes, dtypes and bytes."""
    assert list(a) == list(b)
    for name, x in a.items():
        assert (x.dtype, x.shape) == (b[name].dtype, b[name].shape), name
        assert np.ascontiguousarray(x).tobytes() == np.ascontiguousarray(b[name]).tobytes(), name
