"""The one form of a checkpoint in memory: every format is read into it and written from it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mert_jax.constants import SAMPLE_RATE
from mert_jax.models.mert_v1 import Head, Student

# fields of a student that give its weights' shapes and meaning; the others are about training
ARCHITECTURE = (
    *("conv_dim", "conv_kernels", "conv_strides", "hidden_size", "num_layers", "num_heads"),
    *("intermediate_size", "pre_norm", "final_dim", "project_equal_widths"),
    *("pos_conv_kernel", "pos_conv_groups"),
)


class About(NamedTuple):
    """Facts that a checkpoint records beside its weights."""

    sample_rate: int = SAMPLE_RATE
    do_normalize: bool = False  # whether each clip is brought to mean 0 and variance 1
    dtype: str = "float32"  # of the tensors as they were read
    flat_moments: bool = False  # Adam's are one vector each, as after fairseq's fp16 training
    special_codes: int = 4  # rows of a codebook before code 0
    row_orders: tuple[tuple[int, ...], ...] = ()  # see `fairseq.row_orders`
    teachers: Mapping[str, str] = {}  # fingerprints by name
    licence: str = ""
    config: Mapping[str, Any] = {}  # the run's settings
    metrics: Mapping[str, Any] = {}  # the run's last logged row
    data: tuple[dict[str, Any], ...] = ()  # the run's datasets
    lineage: tuple[str, ...] = ()  # the checkpoints it descends from


class Checkpoint(NamedTuple):
    """A student with its weights."""

    student: Student
    params: Any  # flax's tree, float32 on the host
    moments: tuple[Any, Any] | None  # Adam's (mu, nu), each shaped like `params`
    step: int  # number of completed updates
    about: About


def without_heads(checkpoint: Checkpoint) -> Checkpoint:
    """Return the encoder alone, without moments."""
    names = tuple(f"{head.name}_" for head in checkpoint.student.heads)
    body = {k: v for k, v in checkpoint.params.items() if not k.startswith(names)}
    student = checkpoint.student.clone(heads=())
    return checkpoint._replace(student=student, params=body, moments=None)


def architecture(student: Student) -> dict[str, Any]:
    """Return the student's architecture as JSON values."""
    heads = [head._asdict() for head in student.heads]
    return {name: getattr(student, name) for name in ARCHITECTURE} | {"heads": heads}


def student_of(numbers: dict[str, Any]) -> Student:
    """Return the student of an `architecture`, without dropout, in float32."""
    fields = {name: numbers[name] for name in ARCHITECTURE}
    fields |= {name: tuple(numbers[name]) for name in ("conv_kernels", "conv_strides")}
    return Student(**fields, heads=tuple(Head(**head) for head in numbers["heads"]))
