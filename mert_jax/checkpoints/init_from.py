"""A run that begins from other weights: what is taken over, what is made anew, and why."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from mert_jax.checkpoints.in_memory import ARCHITECTURE, About, Checkpoint
from mert_jax.checkpoints.train_state import AdamState, TrainState
from mert_jax.errors import UserError
from mert_jax.models.mert_v1 import Head, Student
from mert_jax.sharding import placed

# of ARCHITECTURE, what the body does not depend on, always and where its widths differ
OF_HEADS, EQUAL_WIDTHS = ("final_dim",), "project_equal_widths"


class InitialWeights(NamedTuple):
    """What a run takes over: parameters by path, Adam's moments of the same paths (None where there
    are none) and the updates they have seen; lines that say so; what the checkpoint says of itself.
    """

    params: dict[str, np.ndarray]
    moments: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None
    count: int
    lines: list[str]
    about: About


def match_checkpoint(
    checkpoint: Checkpoint, student: Student, teachers: Mapping[str, str], special_codes: int
) -> InitialWeights:
    """What `student` takes over from `checkpoint`: all of the body, and each head whose teacher is
    the same.

    `teachers` are the fingerprints of this run's, by name, `special_codes` the rows before the
    first code in its heads. Raises UserError where the body is another one, or the sample rate.
    """
    about, theirs = checkpoint.about, checkpoint.student
    free = OF_HEADS if student.conv_dim == student.hidden_size else (*OF_HEADS, EQUAL_WIDTHS)
    differing = [
        f"{name} is {getattr(theirs, name)} there and {getattr(student, name)} here"
        for name in ARCHITECTURE
        if name not in free and getattr(theirs, name) != getattr(student, name)
    ]
    if about.sample_rate != 24_000:
        differing.append(f"it hears {about.sample_rate} Hz, and this program 24000 Hz")
    if differing:
        raise UserError(
            f"the checkpoint is another student than the config's: {'; '.join(differing)}; take "
            "the config of its size, or set config.model to its values"
        )
    flat = [traverse_util.flatten_dict(tree, sep="/") for tree in _trees(checkpoint)]
    heads = {head.name: head for head in theirs.heads}
    body = [name for name in flat[0] if not _is_of(name, heads)]
    size = sum(flat[0][name].size for name in body)
    lines = [f"body: {size:,} parameters loaded"]
    taken = [{name: tree[name] for name in body} for tree in flat]
    for head in student.heads:
        rows = about.special_codes - special_codes if head.num_codebooks else 0
        why = _differs(head, heads.get(head.name), student, theirs, rows)
        same = about.teachers.get(head.name)
        if not why and same and same != teachers[head.name]:
            why = "its teacher is another one"
        if why:
            lines.append(f"head {head.name}: new, for {why}")
            continue
        for tree, ours in zip(flat, taken, strict=True):
            ours |= {
                name: x[:, rows:] if name == f"{head.name}_codebooks" else x
                for name, x in tree.items()
                if _is_of(name, {head.name: head})
            }
        said = [f"without the {rows} special rows of each codebook"] if rows else []
        if not same:
            said.append("taken to be of the same teacher, which the checkpoint does not name")
        lines.append(f"head {head.name}: " + ", ".join(["loaded", *said]))
    for name in heads.keys() - {head.name for head in student.heads}:
        lines.append(f"head {name}: left out, for no teacher of this run is called so")
    if checkpoint.moments:
        lines.append(f"Adam's moments: loaded, of {checkpoint.step:,} updates; new heads' are 0")
    else:
        lines.append("Adam's moments: new, for the checkpoint has none")
    if about.do_normalize:
        lines.append("waves: the checkpoint's were normalised, this run's are as they are")
    moments = tuple(taken[1:]) if checkpoint.moments else None
    return InitialWeights(taken[0], moments, checkpoint.step, lines, about)


def apply_initial_weights(state: TrainState, start: InitialWeights) -> TrainState:
    """`state`, as initialised, with what `start` takes over in its place: at step 0, so that the
    learning rate warms up again."""
    params = _replaced(state.params, start.params)
    if not start.moments:
        return state._replace(params=params)
    adam = next(part for part in state.opt_state if isinstance(part, AdamState))
    mu, nu = (_replaced(*x) for x in zip((adam.mu, adam.nu), start.moments, strict=True))
    loaded = AdamState(placed(np.int32(start.count), adam.count.sharding), mu, nu)
    opt_state = tuple(loaded if part is adam else part for part in state.opt_state)
    return state._replace(params=params, opt_state=opt_state)


def _trees(checkpoint: Checkpoint) -> list[Any]:
    return [checkpoint.params, *(checkpoint.moments or ())]


def _is_of(path: str, heads: Mapping[str, Head]) -> bool:
    return any(path.startswith((f"{name}_proj/", f"{name}_codebooks")) for name in heads)


def _differs(
    head: Head, found: Head | None, student: Student, theirs: Student, rows: int
) -> str | None:
    """Why `found` cannot be `head`, None where it can."""
    if found is None:
        return "the checkpoint has none of that name"
    if found.num_codebooks != head.num_codebooks:
        return f"there it has {found.num_codebooks} codebooks and here {head.num_codebooks}"
    if rows < 0 or found.size - rows != head.size:
        return f"there it has {found.size} classes and here {head.size}"
    if head.num_codebooks and theirs.final_dim != student.final_dim:
        return f"final_dim is {theirs.final_dim} there and {student.final_dim} here"
    return None


def _replaced(tree: Any, new: Mapping[str, np.ndarray]) -> Any:
    flat = traverse_util.flatten_dict(tree, sep="/")
    flat |= {
        name: placed(np.asarray(x, flat[name].dtype), flat[name].sharding)
        for name, x in new.items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")
