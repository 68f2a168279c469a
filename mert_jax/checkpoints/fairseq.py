"""Files of the official trainer, read and written without fairseq (its `trainer.py`).

Adam's moments are one entry for each parameter or, after fp16 training, one vector of all.
"""

import ast
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.signal import get_window

from mert_jax.checkpoints import tensor_names
from mert_jax.checkpoints.in_memory import About, Checkpoint
from mert_jax.constants import SAMPLE_RATE
from mert_jax.errors import UserError
from mert_jax.models.mert_v1 import Head, Student
from mert_jax.teachers import cqt
from mert_jax.tensors import state_dict, torch_pickle

SPECIAL = 4  # rows of a codebook before its codes: <s>, <pad>, </s>, <unk>
FMIN, OCTAVES = 32.7, 7  # of the CQT head
ORDERS = "mert_jax_row_orders"  # extra state of files that we write without their dictionaries
FC1 = "encoder.layers.0.fc1.weight"
OTHER = "convert --to=hf or --to=orbax"  # takes what fairseq cannot have
# settings that name a field of Student, and settings that no MERT has otherwise
FIELDS = dict(
    encoder_layers="num_layers",
    encoder_embed_dim="hidden_size",
    encoder_ffn_embed_dim="intermediate_size",
    encoder_attention_heads="num_heads",
    layer_norm_first="pre_norm",
    conv_pos="pos_conv_kernel",
    conv_pos_groups="pos_conv_groups",
)
FIXED = dict(extractor_mode="default", conv_bias=False, deepnorm=False, untie_final_proj=True)
DEFAULT_CONV = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"
CONV_TERM = r"\[(\(\d+,\d+,\d+\),?)+\](\*\d+)?"


def plain(x: Any) -> Any:
    """Return settings of argparse or OmegaConf as dicts, lists and values."""
    if isinstance(x, torch_pickle.Stub):
        fields = vars(x)
        return plain(fields.get("_content", fields.get("_val", x.args[0] if x.args else fields)))
    if isinstance(x, dict):
        return {plain(k): plain(v) for k, v in x.items()}
    return [plain(v) for v in x] if isinstance(x, list | tuple) else x


def conv_layers(text: str) -> list[tuple[int, int, int]]:
    """Parse `conv_feature_layers`, "[(512,10,5)] + [(512,3,2)] * 4": (channels, kernel, stride)."""
    compact = re.sub(r"\s", "", str(text))
    if not re.fullmatch(rf"{CONV_TERM}(\+{CONV_TERM})*", compact):
        raise UserError(f"conv_feature_layers is not understood: {text!r}")
    terms = (term.partition("*") for term in compact.split("+"))
    return [layer for term, _, n in terms for layer in ast.literal_eval(term) * int(n or 1)]


def student(config: Mapping, state: Mapping, path: str = "the checkpoint") -> Student:
    """Return the student of these settings and tensors; UserError if they contradict each other."""
    state = tensor_names.weight_norm(state)
    if wrong := [f"{k}={config[k]!r}, not {x}" for k, x in FIXED.items() if config.get(k, x) != x]:
        raise UserError(f"not a MERT this program knows: {'; '.join(wrong)}")
    convs = conv_layers(config.get("conv_feature_layers", DEFAULT_CONV))
    channels, kernels, strides = zip(*convs, strict=True)
    heads, final_dim = [], Student.final_dim
    if state.keys() & {"label_embs_concat", "final_proj.weight", "final_proj.bias"}:
        rows, final_dim = state["label_embs_concat"].shape
        num_codebooks = state["final_proj.weight"].shape[0] // final_dim
        heads.append(Head("rvq_vae", rows // num_codebooks, num_codebooks))
    if state.keys() & {"encoder_cqt_model.fc.weight", "encoder_cqt_model.fc.bias"}:
        heads.append(Head("cqt", state["encoder_cqt_model.fc.weight"].shape[0]))
    width, width_per_group, kernel = state["encoder.pos_conv.0.weight_v"].shape
    sizes = dict(
        encoder_layers=len({k.split(".")[2] for k in state if k.startswith("encoder.layers.")}),
        encoder_embed_dim=width,
        encoder_ffn_embed_dim=state[FC1].shape[0],
        conv_pos=kernel,
        conv_pos_groups=width // width_per_group,
    )
    wrong = [k for k, x in sizes.items() if config.get(k, x) != x]
    if lines := [f"{k}={config[k]}, {sizes[k]} in its tensors" for k in wrong]:
        raise UserError(f"{path}: settings contradict the tensors: {'; '.join(lines)}")
    settings = dict(encoder_attention_heads=12, layer_norm_first=False) | dict(config) | sizes
    return Student(
        conv_dim=channels[0],
        conv_kernels=kernels,
        conv_strides=strides,
        heads=tuple(heads),
        final_dim=final_dim,
        feature_grad_mult=config.get("feature_grad_mult", 1.0),
        **{field: settings[key] for key, field in FIELDS.items()},
    )


def row_orders(content: Mapping, task: Mapping, head: Head, path: str) -> tuple:
    """Return for each codebook the file's row of each of ours, () if all are in our order.

    Our rows are the special ones, then code 0, 1, ... A fairseq dictionary numbers codes as its
    text file lists them; numpy's labels were used as they are, so that code c has row c.
    """
    rows, extra = tuple(range(head.size)), content.get("extra_state")
    dictionaries = (content.get("task_state") or {}).get("dictionaries") or []
    if stated := extra.get(ORDERS) if isinstance(extra, dict) else None:
        orders, source = tuple(map(tuple, stated)), ORDERS
    elif task.get("numpy_memmap_label"):
        orders, source = (rows[-SPECIAL:] + rows[:-SPECIAL],) * head.num_codebooks, "labels"
    else:
        # a dictionary without symbols says nothing: its codes are taken to be in order
        symbols = [list(x.symbols) for x in dictionaries if getattr(x, "symbols", None)]
        places = [{str(s): row for row, s in enumerate(book) if row >= SPECIAL} for book in symbols]
        codes = [str(code) for code in rows[:-SPECIAL]]
        orders = tuple((*rows[:SPECIAL], *(x.get(c, -1) for c in codes)) for x in places)
        source = "its dictionaries"
    numbered = [k for k, order in enumerate(orders) if sorted(order) == list(rows)]
    if orders and numbered != list(range(head.num_codebooks)):
        count = f"{head.num_codebooks} codebooks of {head.size} rows"
        raise UserError(f"{path}: {source} number the rows of books {numbered} only, for {count}")
    return () if set(orders) == {rows} else orders


def _adam_moments(last: Any, state: Mapping, path: str) -> tuple[list[dict], bool]:
    """Return Adam's [mu, nu] by name, [] if there are none, and whether each was one vector."""
    entries = (last or {}).get("state") or {}
    entries = [entries[key] for key in sorted(entries, key=int)]
    shapes = {k: x.shape for k, x in state.items() if not tensor_names.BUFFERS.search(k)}
    sizes = [math.prod(shape) for shape in shapes.values()]
    moments, flat = [], len(entries) == 1 < len(shapes)
    for key in ("exp_avg", "exp_avg_sq") if entries else ():
        vectors = [np.asarray(entry.get(key, ())).reshape(-1) for entry in entries]
        if flat and vectors[0].size == sum(sizes):
            vectors = np.split(vectors[0], np.cumsum(sizes)[:-1])
        if [x.size for x in vectors] != sizes:
            there = f"{sum(x.size for x in vectors)} values in {len(vectors)} tensors"
            here = f"{sum(sizes)} in {len(sizes)}; leave the moments out (--moments=False)"
            raise UserError(f"{path}: the optimiser's {key} has {there}, not {here}")
        pairs = zip(shapes.items(), vectors, strict=True)
        moments.append({name: x.reshape(shape) for (name, shape), x in pairs})
    return moments, flat


def read_checkpoint(path: str, moments: bool = True) -> Checkpoint:
    """Read a file of fairseq's trainer."""
    content = torch_pickle.read_pickle(path)
    content = content if isinstance(content, dict) else {}
    state = content.get("model")
    if not isinstance(state, dict) or FC1 not in state:
        keys = ", ".join(map(str, list(content)[:6])) or "no dict"
        raise UserError(f"{path} is not a checkpoint of fairseq's MERT; it holds: {keys}")
    state_dict.check_state_dict(state, f"{path}: its model")
    cfg, args = plain(content.get("cfg")) or {}, plain(content.get("args")) or {}
    config, task = cfg.get("model") or args, cfg.get("task") or args
    if not config:
        raise UserError(f"{path} has neither cfg nor args: its attention heads are unknown")
    try:
        model = student(config, state, path)
    except KeyError as e:  # a tensor
        raise UserError(f"{path}: missing {e.args[0]}") from e
    codes = "label_embs_concat" in state
    orders = row_orders(content, task, model.heads[0], path) if codes else ()
    last = content.get("last_optimizer_state") if moments else None
    adam, flat = _adam_moments(last, state, path)
    trees = zip((path, f"{path}, exp_avg", f"{path}, exp_avg_sq"), (state, *adam), strict=False)
    trees = [tensor_names.params_from_fairseq(tree, model, label) for label, tree in trees]
    for tree in trees if orders else ():
        rows = np.array(orders)[..., None]
        tree["rvq_vae_codebooks"] = np.take_along_axis(tree["rvq_vae_codebooks"], rows, axis=1)
    params, *adam = trees
    about = About(
        sample_rate=task.get("sample_rate", SAMPLE_RATE),
        do_normalize=bool(task.get("normalize", False)),
        dtype=tensor_names.dtype_of(state),
        flat_moments=flat,
        row_orders=orders,
        lineage=(f"{os.path.basename(path)} (fairseq)",),
    )
    history = content.get("optimizer_history") or [{}]
    step = int(history[-1].get("num_updates", 0))
    return Checkpoint(model, params, tuple(adam) or None, step, about)


def cqt_tables(size: int, sample_rate: int = SAMPLE_RATE) -> dict[str, np.ndarray]:
    """Return the lengths [F] and kernels [F, 1, N] of nnAudio's CQT1992v2 (its `utils.py`)."""
    per_octave = max(size // OCTAVES, 1)
    lengths, frequencies = cqt.lengths_and_frequencies(sample_rate, FMIN, size, per_octave)
    points = 2 ** math.ceil(math.log2(lengths.max()))
    kernels = np.zeros((size, 1, points), np.complex64)
    for k, (length, frequency) in enumerate(zip(lengths.tolist(), frequencies, strict=True)):
        before = -(-length // 2)
        turns = np.arange(-before, length - before) * 1j * 2 * np.pi * frequency / sample_rate
        kernel = get_window("hann", length) * np.exp(turns) / length
        kernels[k, 0, points // 2 - before :][:length] = kernel / np.abs(kernel).sum()
    tables = dict(lenghts=lengths.astype(np.float32))  # spelt so upstream
    tables |= dict(cqt_kernels_real=kernels.real, cqt_kernels_imag=kernels.imag)
    return {f"encoder_cqt_model.spec_layer.{name}": x for name, x in tables.items()}


def _settings(student: Student, about: About, codes: Head, features: Head) -> dict[str, Any]:
    """Return the `cfg` from which fairseq builds the model: its sizes, and MERT's constants."""
    shapes = zip(student.conv_kernels, student.conv_strides, strict=True)
    convs = str([(student.conv_dim, *shape) for shape in shapes])
    temperature = about.config.get("objective", {}).get("logit_temperature", 0.1)
    scale = about.config.get("model", {}).get("feature_grad_mult", 1.0)
    body = dict(extractor_mode="default", conv_feature_layers=convs, conv_bias=False)
    body |= {setting: getattr(student, field) for setting, field in FIELDS.items()}
    heads = dict(final_dim=student.final_dim, untie_final_proj=True, logit_temp=temperature)
    last = dict(feature_grad_mult=scale, audio_cqt_loss_m=True, audio_cqt_bins=features.size)
    names = [f"encodec_{k}" for k in range(codes.num_codebooks)]
    waves = dict(label_rate=75.0, sample_rate=about.sample_rate, normalize=about.do_normalize)
    return {
        "_name": None,
        "model": {"_name": "mert", "label_rate": 75.0} | body | heads | last,
        "task": {"_name": "mert_pretraining", "labels": names} | waves,
    }


def _official_state(params: Any, about: About, codes: Head) -> dict[str, np.ndarray]:
    """Return fairseq's tensors of `params` or moments, with the rows of codebooks in its order."""
    name = f"{codes.name}_codebooks"
    books = params[name]
    if about.row_orders:
        rows = np.argsort(about.row_orders, axis=1)
        books = np.take_along_axis(books, rows[..., None], axis=1)
    if not about.special_codes:  # zeros for the rows that this run lacks
        books = np.pad(books, ((0, 0), (SPECIAL, 0), (0, 0)))
    return tensor_names.params_to_fairseq(params | {name: books})


def write_checkpoint(path: str, checkpoint: Checkpoint) -> None:
    """Write a file of fairseq's trainer. Raises UserError if fairseq has no such student."""
    student, about = checkpoint.student, checkpoint.about
    if sorted(bool(head.num_codebooks) for head in student.heads) != [False, True]:
        names = ", ".join(head.name for head in student.heads) or "none"
        heads = f"one head for codes and one for the CQT; this has: {names}"
        raise UserError(f"fairseq has {heads}; {OTHER}")
    if about.special_codes not in (0, SPECIAL):
        rows = f"codebooks have {about.special_codes} special rows, fairseq's {SPECIAL}"
        raise UserError(f"{rows}; {OTHER}")
    if student.project_equal_widths and student.conv_dim == student.hidden_size:
        raise UserError(f"fairseq does not project equal widths; this student does; {OTHER}")
    features, codes = sorted(student.heads, key=lambda head: head.num_codebooks)
    model = _official_state(checkpoint.params, about, codes)
    model |= cqt_tables(features.size, about.sample_rate)
    names, dtype = sorted(model, key=tensor_names.fairseq_rank), tensor_names.DTYPES[about.dtype]
    last, step = None, checkpoint.step
    if checkpoint.moments:  # as torch's optimiser numbers them
        adam = [list(_official_state(x, about, codes).values()) for x in checkpoint.moments]
        if about.flat_moments:
            adam = [[np.concatenate([x.reshape(-1) for x in xs])] for xs in adam]
        pairs = enumerate(zip(*adam, strict=True))
        state = {i: {"step": step, "exp_avg": mu, "exp_avg_sq": nu} for i, (mu, nu) in pairs}
        last = {"state": state, "param_groups": [{"params": list(state)}]}
    history = dict(criterion_name="MertCriterion", optimizer_name="Adam", lr_scheduler_state={})
    content = {
        "args": None,
        "cfg": _settings(student, about, codes, features),
        "model": {name: np.asarray(model[name], dtype) for name in names},
        "criterion": {},
        "optimizer_history": [history | {"num_updates": step}],
        "task_state": {},
        "extra_state": {ORDERS: about.row_orders} if about.row_orders else {},
        "last_optimizer_state": last,
    }
    torch_pickle.write_pickle(path, content)
