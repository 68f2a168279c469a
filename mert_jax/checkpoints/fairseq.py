"""Files of the official trainer, read and written without fairseq (facebookresearch/fairseq,
`trainer.py`, `optim/fp16_optimizer.py`).

A file holds settings (`cfg`, or `args` in old files), tensors (`model`), the number of updates
(`optimizer_history`), the dictionaries of codes (`task_state`) and Adam's moments
(`last_optimizer_state`): one entry for each parameter, or one vector of all after fp16 training.
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
from mert_jax.checkpoints.in_memory import About, Checkpoint, common_width
from mert_jax.constants import SAMPLE_RATE
from mert_jax.errors import UserError
from mert_jax.models.mert_v1 import Head, Student
from mert_jax.teachers import cqt
from mert_jax.tensors import torch_pickle

Orders = tuple[tuple[int, ...], ...]
SPECIAL = 4  # rows of a codebook before its codes: <s>, <pad>, </s>, <unk>
FMIN, OCTAVES = 32.7, 7  # of the CQT head
ORDERS = "mert_jax_row_orders"  # extra state of files that we write without their dictionaries
# tensors whose shapes give the sizes of the student, and those of each head, which come together
BODY = ("encoder.pos_conv.0.weight_v", "encoder.layers.0.fc1.weight")
HEADS = (
    ("label_embs_concat", "final_proj.weight", "final_proj.bias"),
    ("encoder_cqt_model.fc.weight", "encoder_cqt_model.fc.bias"),
)
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
        for inner in ("_content", "_val"):
            if inner in vars(x):
                return plain(vars(x)[inner])
        return plain(x.args[0]) if x.args else plain(vars(x))
    if isinstance(x, dict):
        return {plain(k): plain(v) for k, v in x.items()}
    return [plain(v) for v in x] if isinstance(x, list | tuple) else x


def conv_layers(text: str) -> list[tuple[int, int, int]]:
    """Parse fairseq's `conv_feature_layers` into a list of (channels, kernel, stride).

    Understands sums of lists that may be repeated, such as "[(512,10,5)] + [(512,3,2)] * 4".
    """
    compact = re.sub(r"\s", "", str(text))
    if not re.fullmatch(rf"{CONV_TERM}(\+{CONV_TERM})*", compact):
        raise UserError(f"conv_feature_layers is not understood: {text!r}")
    terms = (term.partition("*") for term in compact.split("+"))
    return [layer for term, _, n in terms for layer in ast.literal_eval(term) * int(n or 1)]


def student(
    config: Mapping[str, Any], state: Mapping[str, np.ndarray], path: str = "the checkpoint"
) -> Student:
    """Return the student of a fairseq checkpoint, without dropout, its heads named rvq_vae and cqt.

    Sizes are those of the tensors in `state`, the rest is from `config`, the model's settings.
    Raises UserError for settings that no MERT has or that contradict the tensors.
    """
    state = tensor_names.weight_norm(state)
    needed = (BODY, *(group for group in HEADS if not state.keys().isdisjoint(group)))
    if missing := [name for group in needed for name in group if name not in state]:
        raise UserError(f"{path}: missing {', '.join(missing)}")
    channels, kernels, strides = zip(
        *conv_layers(config.get("conv_feature_layers", DEFAULT_CONV)), strict=True
    )
    if wrong := [f"{k}={config[k]!r}" for k, x in FIXED.items() if config.get(k, x) != x]:
        raise UserError(f"not a MERT this program knows: {', '.join(wrong)}")
    heads, options = [], {}
    if "label_embs_concat" in state:
        rows, final_dim = state["label_embs_concat"].shape
        num_codebooks = state["final_proj.weight"].shape[0] // final_dim
        heads.append(Head("rvq_vae", rows // num_codebooks, num_codebooks))
        options["final_dim"] = final_dim
    if "encoder_cqt_model.fc.weight" in state:
        heads.append(Head("cqt", state["encoder_cqt_model.fc.weight"].shape[0]))
    width, width_per_group, kernel = state["encoder.pos_conv.0.weight_v"].shape
    model = Student(
        conv_dim=common_width(channels),
        conv_kernels=kernels,
        conv_strides=strides,
        hidden_size=width,
        num_layers=len({name.split(".")[2] for name in state if name.startswith("encoder.layers")}),
        num_heads=config.get("encoder_attention_heads", 12),
        intermediate_size=state["encoder.layers.0.fc1.weight"].shape[0],
        pre_norm=config.get("layer_norm_first", False),
        heads=tuple(heads),
        pos_conv_kernel=kernel,
        pos_conv_groups=width // width_per_group,
        feature_grad_mult=config.get("feature_grad_mult", 1.0),
        **options,
    )
    sizes = {setting: getattr(model, field) for setting, field in FIELDS.items()}
    if wrong := [
        f"{k}={config[k]}, {x} in its tensors" for k, x in sizes.items() if config.get(k, x) != x
    ]:
        raise UserError(f"{path}: settings contradict the tensors: {'; '.join(wrong)}")
    return model


def row_orders(
    content: Mapping[str, Any], task: Mapping[str, Any], head: Head, path: str
) -> Orders:
    """Return for each codebook the file's row of each of ours, () if all are in our order.

    Our rows are the special ones, then code 0, 1, ... A fairseq dictionary numbers codes as its
    text file lists them; numpy's labels were used as they are, so that code c has row c. Raises
    UserError if rows and codes do not match one to one.
    """
    rows = tuple(range(head.size))
    extra = content.get("extra_state")
    dictionaries = (content.get("task_state") or {}).get("dictionaries") or []
    # a dictionary without symbols says nothing: its codes are taken to be in order
    dictionaries = [x for x in dictionaries if getattr(x, "symbols", None)]
    if stated := extra.get(ORDERS) if isinstance(extra, dict) else None:
        orders = tuple(map(tuple, stated))
        if [sorted(order) for order in orders] != [list(rows)] * head.num_codebooks:
            size = f"{head.num_codebooks} books of {head.size}"
            raise UserError(f"{path}: {ORDERS} does not order {size}")
    elif task.get("numpy_memmap_label"):
        orders = (rows[-SPECIAL:] + rows[:-SPECIAL],) * head.num_codebooks
    elif len(dictionaries) not in (0, head.num_codebooks):
        raise UserError(f"{len(dictionaries)} dictionaries for {head.num_codebooks} codebooks")
    else:
        orders = tuple(_row_order(x.symbols, head.size, k) for k, x in enumerate(dictionaries))
    return () if set(orders) == {rows} else orders


def _row_order(symbols: list[str], size: int, book: int) -> tuple[int, ...]:
    symbols = list(symbols)[SPECIAL:]
    codes = [int(s) for s in symbols if str(s).isdecimal()]
    if len(symbols) != size - SPECIAL or sorted(codes) != list(range(size - SPECIAL)):
        raise UserError(
            f"the dictionary of codebook {book} has {len(symbols)} symbols, {len(set(codes))} "
            f"different codes among them, for a codebook of {size - SPECIAL}: its rows cannot be "
            "told apart"
        )
    return (*range(SPECIAL), *(SPECIAL + np.argsort(codes)).tolist())


def _reordered(state: dict[str, np.ndarray], orders: Orders, back: bool = False) -> dict:
    """Return `state` with the rows of its codebooks in our order, or `back` in the file's."""
    if not orders:
        return state
    books = state["label_embs_concat"].reshape(len(orders), len(orders[0]), -1)
    rows = np.argsort(orders, axis=1) if back else np.array(orders)
    books = np.take_along_axis(books, rows[..., None], axis=1)
    return state | {"label_embs_concat": books.reshape(-1, books.shape[-1])}


def _adam_moments(last: Any, state: Mapping[str, np.ndarray], path: str) -> tuple[list[dict], bool]:
    """Return Adam's [mu, nu] by name, [] if there are none, and whether each was one vector.

    Raises UserError if their sizes are not those of the parameters in `state`.
    """
    entries = (last or {}).get("state") or {}
    entries = [entries[key] for key in sorted(entries, key=int)]
    trained = [name for name in state if not tensor_names.BUFFERS.search(name)]
    sizes = [state[name].size for name in trained]
    moments, flat = [], len(entries) == 1 < len(trained)
    for key in ("exp_avg", "exp_avg_sq") if entries else ():
        if any(key not in entry for entry in entries):
            raise UserError(
                f"{path}: the optimiser's state has no {key}, so it is not Adam's; leave the "
                "moments out (--moments=False)"
            )
        vectors = [np.asarray(entry[key]) for entry in entries]
        if flat and vectors[0].size == sum(sizes):
            vectors = np.split(vectors[0].reshape(-1), np.cumsum(sizes)[:-1])
        if [x.size for x in vectors] != sizes:
            raise UserError(
                f"{path}: the optimiser's {key} has {sum(x.size for x in vectors)} values in "
                f"{len(vectors)} tensors for {sum(sizes)} in {len(trained)} parameters; leave the "
                "moments out (--moments=False)"
            )
        pairs = zip(trained, vectors, strict=True)
        moments.append({name: x.reshape(state[name].shape) for name, x in pairs})
    return moments, flat


def read_checkpoint(path: str, moments: bool = True) -> Checkpoint:
    """Read a fairseq file. Raises UserError as `reading.read_checkpoint` does."""
    content = torch_pickle.read_pickle(path)
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or BODY[1] not in state:
        keys = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else "no dict"
        raise UserError(f"{path} is not a checkpoint of fairseq's MERT; it holds: {keys}")
    if odd := [str(name) for name, x in state.items() if not isinstance(x, np.ndarray)]:
        raise UserError(f"{path}: entries of its model are not tensors: {', '.join(odd[:5])}")
    cfg, args = plain(content.get("cfg")) or {}, plain(content.get("args")) or {}
    config, task = cfg.get("model") or args, cfg.get("task") or args
    if not config:
        raise UserError(
            f"{path} has neither cfg nor args, so its attention heads and the place of its norms "
            "are unknown"
        )
    model = student(config, state, path)
    codes = "label_embs_concat" in state
    orders = row_orders(content, task, model.heads[0], path) if codes else ()
    trees, flat = [("", state)], False
    if moments:
        adam, flat = _adam_moments(content.get("last_optimizer_state"), state, path)
        trees += zip((", exp_avg", ", exp_avg_sq"), adam, strict=bool(adam))
    params, *adam = (
        tensor_names.params_from_fairseq(_reordered(tree, orders), model, path + label)
        for label, tree in trees
    )
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
    """Return nnAudio's CQT1992v2 as the official model stores it: lengths [F], kernels [F, 1, N].

    Source: KinWaiCheuk/nnAudio, `utils.py`; teachers/cqt.py describes the transform.
    """
    per_octave = max(size // OCTAVES, 1)
    lengths, frequencies = cqt.lengths_and_frequencies(sample_rate, FMIN, size, per_octave)
    points = 2 ** math.ceil(math.log2(lengths.max()))
    kernels = np.zeros((size, 1, points), np.complex64)
    for k, (length, frequency) in enumerate(zip(lengths.tolist(), frequencies, strict=True)):
        before = -(-length // 2)
        turns = np.arange(-before, length - before) * 1j * 2 * np.pi * frequency / sample_rate
        kernel = get_window("hann", length) * np.exp(turns) / length
        kernel /= np.abs(kernel).sum()
        kernels[k, 0, points // 2 - before :][:length] = kernel
    prefix = "encoder_cqt_model.spec_layer."
    return {
        f"{prefix}lenghts": lengths.astype(np.float32),
        f"{prefix}cqt_kernels_real": kernels.real,
        f"{prefix}cqt_kernels_imag": kernels.imag,
    }


def _settings(student: Student, about: About, codes: Head, features: Head) -> dict[str, Any]:
    """Return the `cfg` from which fairseq builds the model: its sizes, and MERT's constants."""
    convs = zip(student.conv_kernels, student.conv_strides, strict=True)
    model = dict(
        _name="mert",
        label_rate=75.0,
        extractor_mode=FIXED["extractor_mode"],
        conv_feature_layers=str([(student.conv_dim, *conv) for conv in convs]),
        conv_bias=FIXED["conv_bias"],
        **{setting: getattr(student, field) for setting, field in FIELDS.items()},
        final_dim=student.final_dim,
        untie_final_proj=FIXED["untie_final_proj"],
        logit_temp=about.config.get("objective", {}).get("logit_temperature", 0.1),
        feature_grad_mult=about.config.get("model", {}).get("feature_grad_mult", 1.0),
        audio_cqt_loss_m=True,
        audio_cqt_bins=features.size,
    )
    task = dict(
        _name="mert_pretraining",
        labels=[f"encodec_{k}" for k in range(codes.num_codebooks)],
        label_rate=75.0,
        sample_rate=about.sample_rate,
        normalize=about.do_normalize,
    )
    return {"_name": None, "model": model, "task": task}


def _official_state(params: Any, about: About, codes: Head) -> dict[str, np.ndarray]:
    """Return fairseq's tensors of `params` or moments, with the rows of codebooks in its order.

    A run without special codes gets zeros for their rows.
    """
    state = _reordered(tensor_names.params_to_fairseq(params), about.row_orders, back=True)
    if about.special_codes not in (0, SPECIAL):
        raise UserError(f"codebooks have {about.special_codes} special rows, fairseq's {SPECIAL}")
    if not about.special_codes:
        books = state["label_embs_concat"].reshape(codes.num_codebooks, codes.size, -1)
        padded = np.pad(books, ((0, 0), (SPECIAL, 0), (0, 0)))
        state["label_embs_concat"] = padded.reshape(-1, books.shape[-1])
    return state


def _optimizer_state(mu: Mapping, nu: Mapping, step: int, flat: bool) -> dict[str, Any]:
    """Return Adam's moments as torch's optimiser numbers them, or `flat` in one vector each."""
    vectors = [list(moment.values()) for moment in (mu, nu)]
    if flat:
        vectors = [[np.concatenate([x.reshape(-1) for x in xs])] for xs in vectors]
    pairs = zip(*vectors, strict=True)
    state = {i: {"step": step, "exp_avg": m, "exp_avg_sq": v} for i, (m, v) in enumerate(pairs)}
    return {"state": state, "param_groups": [{"params": list(state)}]}


def write_checkpoint(path: str, checkpoint: Checkpoint) -> None:
    """Write the checkpoint with the names, shapes and order of fairseq's trainer.

    Raises UserError if the student lacks one of fairseq's two heads, OSError on a full disk.
    """
    student, about = checkpoint.student, checkpoint.about
    if sorted(bool(head.num_codebooks) for head in student.heads) != [False, True]:
        names = ", ".join(head.name for head in student.heads) or "none"
        raise UserError(
            "fairseq's model has one head for codes and one for the CQT, and loads nothing else; "
            f"this checkpoint has: {names}"
        )
    if student.project_equal_widths and student.conv_dim == student.hidden_size:
        raise UserError("fairseq does not project equal widths; this student does")
    features, codes = sorted(student.heads, key=lambda head: head.num_codebooks)
    model = _official_state(checkpoint.params, about, codes)
    model |= cqt_tables(features.size, about.sample_rate)
    names = sorted(model, key=tensor_names.fairseq_rank)
    last = None
    if checkpoint.moments:
        adam = (_official_state(x, about, codes) for x in checkpoint.moments)
        last = _optimizer_state(*adam, checkpoint.step, about.flat_moments)
    history = dict(criterion_name="MertCriterion", optimizer_name="Adam", lr_scheduler_state={})
    content = {
        "args": None,
        "cfg": _settings(student, about, codes, features),
        "model": {
            name: np.asarray(model[name], tensor_names.DTYPES[about.dtype]) for name in names
        },
        "criterion": {},
        "optimizer_history": [history | {"num_updates": checkpoint.step}],
        "task_state": {},
        "extra_state": {ORDERS: about.row_orders} if about.row_orders else {},
        "last_optimizer_state": last,
    }
    torch_pickle.write_pickle(path, content)
