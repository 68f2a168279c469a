"""Embedding files against transformers' Hubert: the same 95M weights and wav files, all hidden
states, on the CPU; 1 and 8 files of 5 s (the peer's in one batch) and of 60 s (one after another).

python -m tests.benchmarks.extract [CASE ...]
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import soundfile

from mert_jax.errors import UserError
from tests.benchmarks import measure
from tests.benchmarks.rvq_vae import music

CASES = {"1x5s": (1, 5), "8x5s": (8, 5), "1x60s": (1, 60), "8x60s": (8, 60)}
RATE = 24_000


def write_inputs(folder: str) -> None:
    """A Hugging Face directory of random weights, full size, and wav files of both lengths."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from mert_jax.checkpoints import huggingface, in_memory

    student = huggingface.student({})
    variables = jax.jit(student.init)(jax.random.key(0), jnp.zeros((1, 4_000)))
    params = jax.tree.map(np.asarray, nn.unbox(variables["params"]))
    path = os.path.join(folder, "model")
    os.mkdir(path)
    checkpoint = in_memory.Checkpoint(student, params, None, 0, in_memory.About())
    huggingface.write_checkpoint(path, checkpoint)
    for seconds in (5, 60):
        for i, wave in enumerate(music(8, seconds * RATE)):
            # different levels show whether files are normalised together
            soundfile.write(_file(folder, seconds, i), wave / (4 + i), RATE)


def _file(folder: str, seconds: int, number: int) -> str:
    return os.path.join(folder, f"{seconds}s_{number}.wav")


def _files(folder: str, number: int, seconds: int) -> list[str]:
    return [_file(folder, seconds, i) for i in range(number)]


def _read(path: str) -> np.ndarray:
    return soundfile.read(path, dtype="float32")[0]


# each side's process imports its own libraries only
def ours(folder: str, number: int, seconds: int) -> Callable[[], list[np.ndarray]]:
    """Build a call of mert_jax: hidden states [13, T, 768] of each file."""
    import mert_jax

    model, files = mert_jax.load(os.path.join(folder, "model")), _files(folder, number, seconds)
    return lambda: list(model.embed(map(_read, files)))


def transformers(folder: str, number: int, seconds: int) -> Callable[[], list[np.ndarray]]:
    """Build a call of transformers with the same result."""
    import torch
    from transformers import HubertModel

    torch.set_num_threads(measure.THREADS)
    model = HubertModel.from_pretrained(os.path.join(folder, "model")).eval()

    def run() -> list[np.ndarray]:
        waves = np.stack([_read(path) for path in _files(folder, number, seconds)])
        found = []
        for batch in [waves] if seconds == 5 else waves[:, None]:
            with torch.no_grad():
                states = model(torch.tensor(batch), output_hidden_states=True).hidden_states
            found.extend(np.stack([x.numpy() for x in states], 1))
        return found

    return run


def rows(cases: Sequence[str] = tuple(CASES)) -> Iterator[dict[str, Any]]:
    """The rows `extract_CASE`: seconds for all files of a case; UserError where the two differ."""
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(folder)
        for case in cases:
            number, seconds = CASES[case]
            try:
                found, wanted = (side(folder, 1, seconds)()[0] for side in (ours, transformers))
            except ImportError as e:
                raise UserError(f"extract: {e}; pip install mert_jax[peers]") from e
            error = float(np.abs(found - wanted).max())
            if error > 1e-4:
                raise UserError(f"extract: hidden states differ by {error:.1e} from transformers'")
            files = folder, number, seconds
            sides = {"ours": (ours, *files), "peer": (transformers, *files)}
            times = measure.apart(sides, calls=3 if seconds == 5 else 1)
            peer = "transformers HubertModel"
            yield measure.row(f"extract_{case}", peer, times["ours"], times["peer"])


if __name__ == "__main__":
    for row in rows(sys.argv[1:] or tuple(CASES)):
        print(row, flush=True)
