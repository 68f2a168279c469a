"""Files of the official trainer, read and written without fairseq (facebookresearch/fairseq,
`trainer.py`, `optim/fp16_optimizer.py`).

A file holds settings (`cfg`, or `args` in old ones), tensors (`model`), the number of updates
(`optimizer_history`), the dictionaries of codes (`task_state`) and Adam's moments
(`last_optimizer_state`): for each parameter, or after fp16 training in one vector of all.
"""

import ast
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.signal import get_window

from mert_jax.checkpoints import tensor_names
from mert_jax.checkpoints.in_memory import About, Checkpoint, one_width
from mert_jax.errors import UserError
from mert_jax.models.mert_v1 import Head, Student
from mert_jax.teachers import cqt
from mert_jax.tensors import torch_pickle

SPECIAL = 4  # rows of a codebook before its codes: <s>, <pad>, </s>, <unk>
FMIN, OCTAVES = 32.7, 7  # of the CQT head
ORDERS = "mert_jax_row_orders"  # its dictionaries lie with the data; this goes with the weights
LAYERS = "encoder.layers."
# tensors whose shapes tell the student's, and those of each head, which come together
BODY = ("encoder.pos_conv.0.weight_v", "encoder.layers.0.fc1.weight")
HEADS = (
    ("label_embs_concat", "final_proj.weight", "final_proj.bias"),
    ("encoder_cqt_model.fc.weight", "encoder_cqt_model.fc.bias"),
)
DEFAULT_CONV = "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2"


def plain(x: Any) -> Any:
    """Settings as dicts, lists and values: argparse's and OmegaConf's objects have them inside."""
    if isinstance(x, torch_pickle.Stub):
        for inside in ("_content", "_val"):
            if inside in vars(x):
                return plain(vars(x)[inside])
        return plain(x.args[0]) if x.args else {k: plain(v) for k, v in vars(x).items()}
    if isinstance(x, dict):
        return {plain(k): plain(v) for k, v in x.items()}
    return [plain(v) for v in x] if isinstance(x, list | tuple) else x


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
        raise ValueError

    try:
        layers = [tuple(layer) for layer in value(ast.parse(str(text), mode="eval").body)]
        if not layers or any(len(layer) != 3 for layer in layers):
            raise ValueError
    except (SyntaxError, TypeError, ValueError) as e:
        raise UserError(f"conv_feature_layers is not understood: {text!r}") from e
    return layers


def student(
    config: Mapping[str, Any], state: Mapping[str, np.ndarray], path: str = "the checkpoint"
) -> Student:
    """The student of a fairseq checkpoint, without dropout: widths from the tensors' shapes, what
    they do not tell from the `config` of its model. Its heads are called rvq_vae and cqt.

    Raises UserError for settings that no MERT has, and where settings and tensors differ.
    """
    state = tensor_names.weight_norm(state)
    together = (BODY, *(group for group in HEADS if not state.keys().isdisjoint(group)))
    tensor_names.refuse(
        [f"missing {name}" for group in together for name in group if name not in state], path
    )
    channels, kernels, strides = zip(
        *conv_layers(config.get("conv_feature_layers", DEFAULT_CONV)), strict=True
    )
    only = dict(extractor_mode="default", conv_bias=False, deepnorm=False, untie_final_proj=True)
    if wrong := [f"{k}={config[k]!r}" for k in only if config.get(k, only[k]) != only[k]]:
        raise UserError(f"not a MERT this program knows: {', '.join(wrong)}")
    heads, options = [], {}
    if "label_embs_concat" in state:
        rows, final_dim = state["label_embs_concat"].shape
        books = state["final_proj.weight"].shape[0] // final_dim
        heads.append(Head("rvq_vae", rows // books, books))
        options["final_dim"] = final_dim
    if "encoder_cqt_model.fc.weight" in state:
        heads.append(Head("cqt", state["encoder_cqt_model.fc.weight"].shape[0]))
    width, width_per_group, kernel = state["encoder.pos_conv.0.weight_v"].shape
    found = Student(
        conv_dim=one_width(channels),
        conv_kernels=kernels,
        conv_strides=strides,
        hidden_size=width,
        num_layers=len({name.split(".")[2] for name in state if name.startswith(LAYERS)}),
        num_heads=config.get("encoder_attention_heads", 12),
        intermediate_size=state["encoder.layers.0.fc1.weight"].shape[0],
        pre_norm=config.get("layer_norm_first", False),
        heads=tuple(heads),
        pos_conv_kernel=kernel,
        pos_conv_groups=width // width_per_group,
        feature_grad_mult=config.get("feature_grad_mult", 1.0),
        **options,
    )
    said = dict(
        encoder_embed_dim=found.hidden_size,
        encoder_layers=found.num_layers,
        encoder_ffn_embed_dim=found.intermediate_size,
        conv_pos=found.pos_conv_kernel,
        conv_pos_groups=found.pos_conv_groups,
    )
    if wrong := [
        f"{k}={config[k]}, {x} in its tensors" for k, x in said.items() if config.get(k, x) != x
    ]:
        raise UserError(f"the settings of the checkpoint are not those of its tensors: {wrong}")
    return found


def row_order(dictionary: torch_pickle.Stub, size: int, raw: bool, book: int) -> list[int]:
    """For each of our rows of a codebook (special ones, then code 0, 1, ...) the file's row.

    A fairseq dictionary numbers codes as its text file lists them; `raw` labels (numpy's) were used
    as they are, so that code c has row c. Raises UserError where rows are not one a code.
    """
    if raw:
        return [*range(size - SPECIAL, size), *range(size - SPECIAL)]
    symbols = list(dictionary.symbols)[SPECIAL:]
    codes = [int(s) for s in symbols if str(s).isdecimal()]
    if len(symbols) != size - SPECIAL or sorted(codes) != list(range(size - SPECIAL)):
        raise UserError(
            f"the dictionary of codebook {book} has {len(symbols)} symbols, {len(set(codes))} "
            f"different codes among them, for a codebook of {size - SPECIAL}: its rows cannot be "
            "told apart"
        )
    return [*range(SPECIAL), *(SPECIAL + np.argsort(codes)).tolist()]


def row_orders(task_state: Any, task: Mapping[str, Any], head: Head) -> tuple[tuple[int, ...], ...]:
    """`row_order` of every codebook, () where all of them are in order already."""
    # one without symbols says nothing: its codes are taken to be in order
    dictionaries = [
        x for x in (task_state or {}).get("dictionaries") or [] if getattr(x, "symbols", None)
    ]
    raw = bool(task.get("numpy_memmap_label"))
    if not dictionaries and not raw:
        return ()
    if not raw and len(dictionaries) != head.num_codebooks:
        raise UserError(f"{len(dictionaries)} dictionaries for {head.num_codebooks} codebooks")
    orders = tuple(
        tuple(row_order(None if raw else dictionaries[k], head.size, raw, k))
        for k in range(head.num_codebooks)
    )
    return () if all(order == tuple(range(head.size)) for order in orders) else orders


def stated_orders(extra: Any, head: Head, path: str) -> tuple[tuple[int, ...], ...]:
    """What `write` says of the file's rows, () where it is none of ours. Raises UserError where it
    is no order of them."""
    stated = extra.get(ORDERS, ()) if isinstance(extra, dict) else ()
    rows = list(range(head.size))
    if stated and [sorted(order) for order in stated] != [rows] * head.num_codebooks:
        raise UserError(
            f"{path}: {ORDERS} does not order {head.num_codebooks} books of {head.size}"
        )
    return tuple(tuple(order) for order in stated)


def reordered(state: dict[str, np.ndarray], orders: Any, back: bool = False) -> dict:
    """`state` with the rows of its codebooks in our order, or `back` in the file's."""
    if not orders:
        return state
    books = state["label_embs_concat"].reshape(len(orders), len(orders[0]), -1)
    rows = [np.argsort(order) if back else np.array(order) for order in orders]
    books = np.stack([book[order] for book, order in zip(books, rows, strict=True)])
    return state | {"label_embs_concat": books.reshape(-1, books.shape[-1])}


def moments_of(last: Any, state: Mapping[str, np.ndarray], path: str) -> Any:
    """Adam's (mu, nu), by name, and whether they came in one vector; None where there are none.

    Raises UserError where they are not of the parameters in `state`.
    """
    entries = (last or {}).get("state") or {}
    entries = [entries[key] for key in sorted(entries, key=int)]
    if not entries:
        return None
    trained = [name for name in state if not tensor_names.BUFFERS.search(name)]
    sizes = [state[name].size for name in trained]
    moments, flat = [], len(entries) == 1 < len(trained)
    for key in ("exp_avg", "exp_avg_sq"):
        if any(key not in entry for entry in entries):
            raise UserError(
                f"{path}: the optimiser's state has no {key}, so that it is not Adam's; leave the "
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
        shaped = [x.reshape(state[name].shape) for x, name in zip(vectors, trained, strict=True)]
        moments.append(dict(zip(trained, shaped, strict=True)))
    return *moments, flat


def read_checkpoint(path: str, moments: bool = True) -> Checkpoint:
    """The checkpoint in a fairseq file. Raises UserError as `formats.read` does."""
    content = torch_pickle.read_pickle(path)
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or "encoder.layers.0.fc1.weight" not in state:
        held = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else "no dict"
        raise UserError(f"{path} is no checkpoint of fairseq's MERT; it holds: {held}")
    if odd := [name for name, x in state.items() if not isinstance(x, np.ndarray)]:
        raise UserError(f"{path}: not tensors, though in its model: {', '.join(map(str, odd[:5]))}")
    cfg, args = plain(content.get("cfg")) or {}, plain(content.get("args")) or {}
    config, task = cfg.get("model") or args, cfg.get("task") or args
    if not config:
        raise UserError(
            f"{path} has neither cfg nor args: whether its layers are pre-norm, and their heads, "
            "cannot be known"
        )
    found = student(config, state, path)
    if "label_embs_concat" in state:
        orders = stated_orders(content.get("extra_state"), found.heads[0], path)
        orders = orders or row_orders(content.get("task_state"), task, found.heads[0])
    else:
        orders = ()
    history = content.get("optimizer_history") or [{}]
    last = moments_of(content.get("last_optimizer_state"), state, path) if moments else None
    of_state = lambda state, what: tensor_names.params_from_fairseq(
        reordered(state, orders), found, f"{path}{what}"
    )
    about = About(
        sample_rate=task.get("sample_rate", 24_000),
        do_normalize=bool(task.get("normalize", False)),
        dtype=tensor_names.dtype_of(state),
        flat_moments=last is not None and last[2],
        row_orders=orders,
        lineage=(f"{os.path.basename(path)} (fairseq)",),
    )
    return Checkpoint(
        found,
        of_state(state, ""),
        last
        and tuple(
            of_state(x, f", {key}") for x, key in zip(last, ("exp_avg", "exp_avg_sq"), strict=False)
        ),
        int(history[-1].get("num_updates", 0)),
        about,
    )


def cqt_tables(size: int, sample_rate: int = 24_000) -> dict[str, np.ndarray]:
    """nnAudio's CQT1992v2 as the official model keeps it: lengths [F] and kernels [F, 1, N],
    float32 (KinWaiCheuk/nnAudio, `utils.py`; SPEC of the transform in teachers/cqt.py)."""
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


def settings(student: Student, about: About) -> dict[str, Any]:
    """The `cfg` that fairseq builds the model from: the weights' sizes, and MERT's constants."""
    convs = zip(student.conv_kernels, student.conv_strides, strict=True)
    books = sum(head.num_codebooks for head in student.heads)
    run = about.config
    model = dict(
        _name="mert",
        label_rate=75.0,
        extractor_mode="default",
        conv_feature_layers=str([(student.conv_dim, *conv) for conv in convs]),
        conv_bias=False,
        encoder_layers=student.num_layers,
        encoder_embed_dim=student.hidden_size,
        encoder_ffn_embed_dim=student.intermediate_size,
        encoder_attention_heads=student.num_heads,
        layer_norm_first=student.pre_norm,
        conv_pos=student.pos_conv_kernel,
        conv_pos_groups=student.pos_conv_groups,
        final_dim=student.final_dim,
        untie_final_proj=True,
        logit_temp=run.get("objective", {}).get("logit_temperature", 0.1),
        feature_grad_mult=run.get("model", {}).get("feature_grad_mult", 1.0),
        audio_cqt_loss_m=True,
        audio_cqt_bins=cqt_size(student),
    )
    task = dict(
        _name="mert_pretraining",
        labels=[f"encodec_{k}" for k in range(books)],
        label_rate=75.0,
        sample_rate=about.sample_rate,
        normalize=about.do_normalize,
    )
    return {"_name": None, "model": model, "task": task}


def official(params: Any, student: Student, about: About) -> dict[str, np.ndarray]:
    """fairseq's tensors of `params` or of their moments, codebooks in the file's order; special
    rows that the run had none of are 0."""
    state = reordered(tensor_names.params_to_fairseq(params), about.row_orders, back=True)
    if about.special_codes not in (0, SPECIAL):
        raise UserError(f"codebooks have {about.special_codes} special rows, fairseq's {SPECIAL}")
    if not about.special_codes:
        head = next(head for head in student.heads if head.num_codebooks)
        books = state["label_embs_concat"].reshape(head.num_codebooks, head.size, -1)
        padded = np.pad(books, ((0, 0), (SPECIAL, 0), (0, 0)))
        state["label_embs_concat"] = padded.reshape(-1, books.shape[-1])
    return state


def optimizer_state(mu: Mapping, nu: Mapping, step: int, flat: bool) -> dict[str, Any]:
    """Adam's moments by name as torch's optimiser numbers them, or `flat` in one vector each."""
    pairs = [(mu[name], nu[name]) for name in mu]
    if flat:
        whole = (np.concatenate([x.reshape(-1) for x in xs]) for xs in zip(*pairs, strict=True))
        pairs = [tuple(whole)]
    entries = [{"step": step, "exp_avg": m, "exp_avg_sq": v} for m, v in pairs]
    groups = [{"params": list(range(len(entries)))}]
    return {"state": dict(enumerate(entries)), "param_groups": groups}


def write_checkpoint(path: str, checkpoint: Checkpoint) -> None:
    """Write the checkpoint as fairseq's trainer does: its names, shapes and order.

    Raises UserError where the student lacks one of fairseq's two heads, OSError where the disk does
    not take it.
    """
    student, about = checkpoint.student, checkpoint.about
    if sorted(bool(head.num_codebooks) for head in student.heads) != [False, True]:
        have = ", ".join(head.name for head in student.heads) or "none"
        raise UserError(
            "fairseq's model has one head for codes and one for the CQT, and loads nothing else; "
            f"this checkpoint has: {have}"
        )
    if student.project_equal_widths and student.conv_dim == student.hidden_size:
        raise UserError("fairseq does not project equal widths; this student does")
    model = official(checkpoint.params, student, about) | cqt_tables(
        cqt_size(student), about.sample_rate
    )
    dtype = tensor_names.DTYPES[about.dtype]
    last = None
    if checkpoint.moments:
        mu, nu = (official(x, student, about) for x in checkpoint.moments)
        last = optimizer_state(mu, nu, checkpoint.step, about.flat_moments)
    history = {
        "criterion_name": "MertCriterion",
        "optimizer_name": "Adam",
        "lr_scheduler_state": {},
        "num_updates": checkpoint.step,
    }
    content = {
        "args": None,
        "cfg": settings(student, about),
        "model": {
            name: np.asarray(model[name], dtype)
            for name in sorted(model, key=tensor_names.fairseq_rank)
        },
        "criterion": {},
        "optimizer_history": [history],
        "task_state": {},
        "extra_state": {ORDERS: about.row_orders} if about.row_orders else {},
        "last_optimizer_state": last,
    }
    torch_pickle.write_pickle(path, content)


def cqt_size(student: Student) -> int:
    """Bins of the student's CQT head."""
    return next(head.size for head in student.heads if not head.num_codebooks)
