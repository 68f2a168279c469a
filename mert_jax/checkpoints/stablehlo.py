"""Exports the student as a StableHLO program for CPU, GPU and TPU, with its weights beside it.

The program is jax.export's of (params, wave [B, N]), for any B and any N.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export

from mert_jax.checkpoints import in_memory
from mert_jax.checkpoints.in_memory import Checkpoint
from mert_jax.errors import UserError
from mert_jax.models.mert_v1 import hidden_states
from mert_jax.tensors import state_dict

PROGRAM, PARAMS = "model.stablehlo", "params.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")
TOLERANCE = 1e-4


def write_checkpoint(path: str, checkpoint: Checkpoint) -> None:
    """Fill the directory `path`, and check the program. Raises OSError on a full disk."""
    student, params, *_ = in_memory.without_heads(checkpoint)
    folder, shortest = Path(path), student.receptive_field
    symbols = export.symbolic_shape("b, n", constraints=(f"n >= {shortest}",))
    function = jax.jit(lambda params, wave: hidden_states(student, params, wave))
    wave = jax.ShapeDtypeStruct(symbols, jnp.float32)
    program = export.export(function, platforms=PLATFORMS)(params, wave)
    (folder / PROGRAM).write_bytes(program.serialize())
    state_dict.write_tensors(folder / PARAMS, traverse_util.flatten_dict(params, sep="/"))
    signature = dict(
        call="(params, wave) -> hidden_states",
        params=f"{PARAMS}, nested at each slash",
        wave=f"float32 [B, N], N >= {shortest}",
        hidden_states=f"float32 [{student.num_layers + 1}, B, T, {student.hidden_size}]",
        sample_rate=checkpoint.about.sample_rate,
        do_normalize=checkpoint.about.do_normalize,
        platforms=PLATFORMS,
        student=in_memory.architecture(student),
    )
    (folder / "signature.json").write_text(json.dumps(signature, indent=1))
    check_program(path, checkpoint)


def load(path: str | os.PathLike) -> tuple[Any, Any]:
    """Return a directory's program, as a function of (params, wave), and its params."""
    program = export.deserialize(bytearray((Path(path) / PROGRAM).read_bytes()))
    params = state_dict.read_tensors(Path(path) / PARAMS)
    return program.call, traverse_util.unflatten_dict(params, sep="/")


def check_program(path: str, checkpoint: Checkpoint) -> None:
    """Raise UserError if the program in `path` and the student itself differ on two batches."""
    call, params = load(path)
    student, body, *_ = in_memory.without_heads(checkpoint)
    rng, shortest, differences = np.random.default_rng(0), student.receptive_field, []
    forward = jax.jit(hidden_states, static_argnums=0)
    for shape in ((1, 3 * shortest), (2, 5 * shortest + 123)):
        wave = rng.normal(0, 0.1, shape).astype(np.float32)
        expected = np.asarray(forward(student, body, wave))
        difference = np.abs(call(params, wave) - expected).max()
        differences.append(difference / max(1, np.abs(expected).max()))
    largest = np.max(differences)  # unlike max(), NaN if any is
    if not largest <= TOLERANCE:
        problem = f"the program differs from the student by {largest:.1e}, over {TOLERANCE:g}"
        raise UserError(f"{problem}: not written")
    print(f"reloaded: at most {largest:.1e} from the student itself", flush=True)
