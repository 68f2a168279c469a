"""Initial weights of a run from a checkpoint: what is loaded, what is new, and why."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from mert_jax.checkpoints import tensor_names
from mert_jax.checkpoints.in_memory import ARCHITECTURE, About, Checkpoint
from mert_jax.checkpoints.train_state import AdamState, TrainState
from mert_jax.constants import SAMPLE_RATE
from mert_jax.errors import UserError
from mert_jax.models.mert_v1 import Student
from mert_jax.sharding import placed


class InitialWeights(NamedTuple):
    """The part of a checkpoint that a run starts from: `params` and Adam's (mu, nu), by path.

    count: number of updates that the moments have seen; lines: a report for the log
    """

    params: dict[str, np.ndarray]
    moments: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None
    count: int
    lines: list[str]
    about: About


def match_checkpoint(
    checkpoint: Checkpoint, student: Student, teachers: Mapping[str, str], special_codes: int
) -> InitialWeights:
    """Return the body of `checkpoint` and those of its heads that have the same teacher.

    teachers: fingerprints of this run's, by name
    special_codes: rows before the first code in the heads of this run

    Raises UserError if the body or the sample rate is another one.
    """
    about, other = checkpoint.about, checkpoint.student
    _check_body(other, student, about.sample_rate)
    shapes = tensor_names.abstract_params(student)
    trees = [
        traverse_util.flatten_dict(tree, sep="/")
        for tree in (checkpoint.params, *(checkpoint.moments or ()))
    ]
    names = [head.name for head in other.heads]
    body = [path for path in trees[0] if not any(_belongs(path, name) for name in names)]
    loaded = [{path: tree[path] for path in body} for tree in trees]
    lines = [f"body: {sum(x.size for x in loaded[0].values()):,} parameters loaded"]
    for head in student.heads:
        rows = about.special_codes - special_codes if head.num_codebooks else 0
        parts = [_head(tree, head.name, rows) for tree in trees]
        sizes, needed = _sizes(parts[0]), _sizes(_head(shapes, head.name))
        stated = about.teachers.get(head.name)
        if head.name not in names:
            lines.append(f"head {head.name}: new, since the checkpoint has no head with that name")
        elif sizes != needed:
            lines.append(f"head {head.name}: new, since it has {sizes} there and {needed} here")
        elif stated and stated != teachers[head.name]:
            lines.append(f"head {head.name}: new, since its teacher is another one")
        else:
            line = f"head {head.name}: loaded"
            line += f", without the {rows} special rows of each codebook" if rows else ""
            unnamed = ", assuming the same teacher, which the checkpoint does not name"
            lines.append(line if stated else line + unnamed)
            loaded = [tree | part for tree, part in zip(loaded, parts, strict=True)]
    for name in set(names) - {head.name for head in student.heads}:
        lines.append(f"head {name}: skipped, since this run has no teacher with that name")
    if checkpoint.moments:
        lines.append(f"Adam's moments: loaded, of {checkpoint.step:,} updates; 0 for new heads")
    else:
        lines.append("Adam's moments: new, since the checkpoint has none")
    if about.do_normalize:
        lines.append("waves: normalised in the checkpoint, not normalised in this run")
    params, *moments = loaded
    return InitialWeights(params, tuple(moments) or None, checkpoint.step, lines, about)


def apply_initial_weights(state: TrainState, start: InitialWeights) -> TrainState:
    """Return the initialised `state` with the weights of `start`, at step 0.

    The learning rate warms up again.
    """
    params = _replaced(state.params, start.params)
    if not start.moments:
        return state._replace(params=params)
    adam = next(part for part in state.opt_state if isinstance(part, AdamState))
    mu, nu = (_replaced(*x) for x in zip((adam.mu, adam.nu), start.moments, strict=True))
    loaded = AdamState(placed(np.int32(start.count), adam.count.sharding), mu, nu)
    opt_state = tuple(loaded if part is adam else part for part in state.opt_state)
    return state._replace(params=params, opt_state=opt_state)


def _check_body(other: Student, student: Student, sample_rate: int) -> None:
    """Raise UserError with all that differs between the two architectures but their heads."""
    ignored = {"final_dim"}
    if student.conv_dim != student.hidden_size:
        ignored.add("project_equal_widths")
    differing = [
        f"{name} is {getattr(other, name)} there and {getattr(student, name)} here"
        for name in ARCHITECTURE
        if name not in ignored and getattr(other, name) != getattr(student, name)
    ]
    if sample_rate != SAMPLE_RATE:
        differing.append(
            f"its sample rate is {sample_rate} Hz, and this program's {SAMPLE_RATE} Hz"
        )
    if differing:
        raise UserError(
            f"the checkpoint's student is not the config's: {'; '.join(differing)}; choose the "
            "config of its size, or set config.model to its values"
        )


def _belongs(path: str, head: str) -> bool:
    return path.startswith((f"{head}_proj/", f"{head}_codebooks"))


def _head(tree: Mapping[str, Any], name: str, rows: int = 0) -> dict[str, Any]:
    """Return the tensors of a head without the first `rows` rows of each codebook."""
    head = {path: x for path, x in tree.items() if _belongs(path, name)}
    if rows and f"{name}_codebooks" in head:
        head[f"{name}_codebooks"] = head[f"{name}_codebooks"][:, rows:]
    return head


def _sizes(head: Mapping[str, Any]) -> str:
    return ", ".join(f"{path} {list(x.shape)}" for path, x in sorted(head.items()))


def _replaced(tree: Any, new: Mapping[str, np.ndarray]) -> Any:
    flat = traverse_util.flatten_dict(tree, sep="/")
    flat |= {
        path: placed(np.asarray(x, flat[path].dtype), flat[path].sharding)
        for path, x in new.items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")
