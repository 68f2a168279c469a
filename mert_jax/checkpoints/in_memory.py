"""Checkpoints of every kind: read into one form, written from it.

A run of ours or what `convert` made (`workdir`), a Hugging Face directory (`huggingface`), or a
file of the official trainer (`fairseq`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from mert_jax.errors import UserError
from mert_jax.models.mert_v1 import Head, Student

# what of a student is its weights' shape and meaning; the rest is how it is trained or computed
ARCHITECTURE = (
    *("conv_dim", "conv_kernels", "conv_strides", "hidden_size", "num_layers", "num_heads"),
    *("intermediate_size", "pre_norm", "final_dim", "project_equal_widths"),
    *("pos_conv_kernel", "pos_conv_groups"),
)


class About(NamedTuple):
    """What a checkpoint says of itself beside its weights.

    sample_rate: Hz; do_normalize: whether each clip is brought to mean 0 and variance 1;
    dtype: of its tensors, as they were read; flat_moments: Adam's moments in one vector, as fairseq
    keeps them in fp16 training; special_codes: rows of a codebook before code 0; row_orders: for
    each codebook the row of a fairseq file that each of ours was, () where they are the same;
    teachers: fingerprints by name; licence, config, metrics (the last line) and data of the run;
    lineage: the checkpoints it goes back to.
    """

    sample_rate: int = 24_000
    do_normalize: bool = False
    dtype: str = "float32"
    flat_moments: bool = False
    special_codes: int = 4
    row_orders: tuple[tuple[int, ...], ...] = ()
    teachers: Mapping[str, str] = {}
    licence: str = ""
    config: Mapping[str, Any] = {}
    metrics: Mapping[str, Any] = {}
    data: tuple[dict[str, Any], ...] = ()
    lineage: tuple[str, ...] = ()


class Checkpoint(NamedTuple):
    """A student with its weights.

    params: flax's tree, float32 on the host; moments: Adam's (mu, nu) like it, None where there are
    none; step: completed updates.
    """

    student: Student
    params: Any
    moments: tuple[Any, Any] | None
    step: int
    about: About


def without_heads(checkpoint: Checkpoint) -> Checkpoint:
    """The encoder alone, without moments."""
    names = tuple(f"{head.name}_" for head in checkpoint.student.heads)
    body = {k: v for k, v in checkpoint.params.items() if not k.startswith(names or ("/",))}
    student = checkpoint.student.clone(heads=())
    return checkpoint._replace(student=student, params=body, moments=None)


def architecture(student: Student) -> dict[str, Any]:
    """The student as numbers, for JSON."""
    return {name: getattr(student, name) for name in ARCHITECTURE} | {
        "heads": [head._asdict() for head in student.heads]
    }


def student_of(numbers: dict[str, Any]) -> Student:
    """The student of `architecture`'s numbers, without dropout, in float32."""
    heads = tuple(Head(**head) for head in numbers["heads"])
    tuples = {name: tuple(numbers[name]) for name in ("conv_kernels", "conv_strides")}
    return Student(**{name: numbers[name] for name in ARCHITECTURE} | tuples | {"heads": heads})


def count_parameters(checkpoint: Checkpoint) -> int:
    """Parameters, heads included."""
    return sum(x.size for x in jax.tree.leaves(checkpoint.params))


def common_width(channels: Any) -> int:
    """The width that all convolutions have; UserError where they differ."""
    if len(set(channels)) != 1:
        raise UserError(f"conv layers of different widths are not supported: {list(channels)}")
    return channels[0]
