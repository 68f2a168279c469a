"""Initial weights of a run from a checkpoint: what is loaded, what is new, and why."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mert_jax.checkpoints import tensor_names
from mert_jax.checkpoints.in_memory import ARCHITECTURE, About, Checkpoint
from mert_jax.checkpoints.train_state import AdamState, TrainState
from mert_jax.constants import SAMPLE_RATE
from mert_jax.errors import UserError
from mert_jax.models.mert_v1 import Student
from mert_jax.sharding import placed


class InitialWeights(NamedTuple):
    """The part of a checkpoint that a run starts from, by path, and a report for the log."""

    params: dict[str, np.ndarray]
    moments: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None  # Adam's (mu, nu)
    count: int  # number of updates that the moments have seen
    lines: list[str]
    about: About


def match_checkpoint(
    checkpoint: Checkpoint, student: Student, teachers: Mapping[str, str], special_codes: int
) -> InitialWeights:
    """Return the body of `checkpoint`, and its heads that have the same teacher as in this run.

    `teachers` are this run's fingerprints. Raises UserError if the body or sample rate differs.
    """
    about = checkpoint.about
    _check_body(checkpoint.student, student, about.sample_rate)
    trees = (checkpoint.params, *(checkpoint.moments or ()))
    trees = [flatten_dict(tree, sep="/") for tree in trees]
    names = [head.name for head in checkpoint.student.heads]
    prefixes = tuple(f"{name}_" for name in names)
    loaded = [{k: x for k, x in tree.items() if not k.startswith(prefixes)} for tree in trees]
    lines = [f"body: {sum(x.size for x in loaded[0].values()):,} parameters loaded"]
    needed = tensor_names.abstract_params(student)
    for head in student.heads:
        rows = about.special_codes - special_codes if head.num_codebooks else 0
        parts = [_head(tree, head.name, rows) for tree in trees]
        there, here = _sizes(parts[0]), _sizes(_head(needed, head.name))
        stated = about.teachers.get(head.name)
        if head.name not in names:
            line = "new, since the checkpoint has no head with that name"
        elif there != here:
            line = f"new, since it has {there} there and {here} here"
        elif stated and stated != teachers[head.name]:
            line = "new, since its teacher is another one"
        else:
            loaded = [tree | part for tree, part in zip(loaded, parts, strict=True)]
            line = f"loaded, without the {rows} special rows of each codebook" if rows else "loaded"
            if not stated:
                line += ", assuming the same teacher, which the checkpoint does not name"
        lines.append(f"head {head.name}: {line}")
    for name in set(names) - {head.name for head in student.heads}:
        lines.append(f"head {name}: skipped, since this run has no teacher with that name")
    line = f"loaded, of {checkpoint.step:,} updates; 0 for new heads"
    line = line if checkpoint.moments else "new, since the checkpoint has none"
    lines.append(f"Adam's moments: {line}")
    if about.do_normalize:
        lines.append("waves: normalised in the checkpoint, not normalised in this run")
    params, *moments = loaded
    return InitialWeights(params, tuple(moments) or None, checkpoint.step, lines, about)


def _check_body(other: Student, student: Student, sample_rate: int) -> None:
    """Raise UserError with all that differs between the two architectures but their heads."""
    ignored = {"final_dim"}
    if student.conv_dim != student.hidden_size:
        ignored.add("project_equal_widths")
    pairs = {name: (getattr(other, name), getattr(student, name)) for name in ARCHITECTURE}
    pairs = {name: pair for name, pair in pairs.items() if name not in ignored}
    pairs["sample rate"] = sample_rate, SAMPLE_RATE
    if lines := [f"{name} is {a} there and {b} here" for name, (a, b) in pairs.items() if a != b]:
        way_out = "choose the config of its size, or set config.model to its values"
        raise UserError(f"the checkpoint's student differs: {'; '.join(lines)}; {way_out}")


def _head(tree: Mapping[str, Any], name: str, rows: int = 0) -> dict[str, Any]:
    """Return the tensors of a head without the first `rows` rows of each codebook."""
    books = f"{name}_codebooks"
    head = {path: x for path, x in tree.items() if path.startswith((f"{name}_proj/", books))}
    return head | {books: head[books][:, rows:]} if rows and books in head else head


def _sizes(head: Mapping[str, Any]) -> str:
    return ", ".join(f"{path} {list(x.shape)}" for path, x in sorted(head.items()))


def apply_initial_weights(state: TrainState, start: InitialWeights) -> TrainState:
    """Return the initialised `state` with the weights of `start`, at step 0 of the schedule."""

    def replaced(tree: Any, new: Mapping[str, np.ndarray]) -> Any:
        old = flatten_dict(tree, sep="/")
        arrays = {k: placed(np.asarray(x, old[k].dtype), old[k].sharding) for k, x in new.items()}
        return unflatten_dict(old | arrays, sep="/")

    state = state._replace(params=replaced(state.params, start.params))
    if not start.moments:
        return state
    adam = next(part for part in state.opt_state if isinstance(part, AdamState))
    mu, nu = (replaced(*x) for x in zip((adam.mu, adam.nu), start.moments, strict=True))
    loaded = AdamState(placed(np.int32(start.count), adam.count.sharding), mu, nu)
    opt_state = tuple(loaded if part is adam else part for part in state.opt_state)
    return state._replace(opt_state=opt_state)
