"""Embedding files against transformers' Hubert: the same 95M weights and wav files, all hidden
states, on the CPU; 1 and 8 files of 5 s (the peer's in one batch) and of 60 s (one after another).

python -m tests.benchmarks.extract [CASE ...]
"""

import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import soundfile

from mert_jax.cli import UserError
from tests.benchmarks import measure
from tests.benchmarks.rvq_vae import music

CASES = {"1x5s": (1, 5), "8x5s": (8, 5), "1x60s": (1, 60), "8x60s": (8, 60)}
REPEATS = {"1x5s": 5, "8x5s": 5, "1x60s": 3, "8x60s": 1}
FOLDER = "MERT_JAX_BENCHMARK_FOLDER"  # a variable: processes measured for memory inherit it
RATE = 24_000


def write_inputs(folder: str) -> None:
    """A Hugging Face directory of random weights, full size, and wav files of both lengths."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from mert_jax import formats
    from mert_jax.formats import huggingface

    student = huggingface.student({})
    variables = jax.jit(student.init)(jax.random.key(0), jnp.zeros((1, 4_000)))
    params = jax.tree.map(np.asarray, nn.unbox(variables["params"]))
    path = os.path.join(folder, "model")
    os.mkdir(path)
    checkpoint = formats.Checkpoint(student, params, None, 0, formats.About())
    huggingface.write(path, checkpoint)
    for seconds in (5, 60):
        for i, wave in enumerate(music(8, seconds * RATE)):
            # each its own level: files must not be normed together
            soundfile.write(_file(folder, seconds, i), wave / (4 + i), RATE)


def _file(folder: str, seconds: int, number: int) -> str:
    return os.path.join(folder, f"{seconds}s_{number}.wav")


def _files(number: int, seconds: int) -> list[str]:
    return [_file(os.environ[FOLDER], seconds, i) for i in range(number)]


def _read(path: str) -> np.ndarray:
    return soundfile.read(path, dtype="float32")[0]


# the libraries are imported where they are used: a process measured for memory has its own only
@functools.cache
def _model() -> Any:
    import mert_jax

    return mert_jax.load(os.path.join(os.environ[FOLDER], "model"))


def ours(number: int, seconds: int) -> Iterator[np.ndarray]:
    """Hidden states [13, T, 768] of each file."""
    return _model().embed(map(_read, _files(number, seconds)))


@functools.cache
def _peer() -> Any:
    import torch
    from transformers import HubertModel

    torch.set_num_threads(measure.THREADS)
    return HubertModel.from_pretrained(os.path.join(os.environ[FOLDER], "model")).eval()


def transformers(number: int, seconds: int) -> Iterator[np.ndarray]:
    """The same by transformers."""
    import torch

    waves = np.stack([_read(path) for path in _files(number, seconds)])
    model = _peer()
    for batch in [waves] if seconds == 5 else waves[:, None]:
        with torch.no_grad():
            states = model(torch.tensor(batch), output_hidden_states=True).hidden_states
        yield from np.stack([x.numpy() for x in states], 1)


def _peak(side: Callable[[int, int], Iterator[np.ndarray]], number: int, seconds: int) -> float:
    os.environ["MERT_JAX_BENCHMARK_CASE"] = f"{side.__name__} {number} {seconds}"
    return measure.peak_mib(run_case)


def run_case() -> None:
    """What a peak of memory is measured of."""
    side, number, seconds = os.environ["MERT_JAX_BENCHMARK_CASE"].split()
    for _ in {"ours": ours, "transformers": transformers}[side](int(number), int(seconds)):
        pass


def rows(cases: Sequence[str] = tuple(CASES)) -> Iterator[dict[str, Any]]:
    """The rows `extract_CASE`: seconds for all files of a case; UserError where the two differ."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FOLDER] = folder
        write_inputs(folder)
        for case in cases:
            number, seconds = CASES[case]
            try:
                pairs = zip(ours(1, seconds), transformers(1, seconds), strict=True)
                error = max(float(np.abs(a - b).max()) for a, b in pairs)
            except ImportError as e:
                raise UserError(f"extract: {e}; pip install mert_jax[peers]") from e
            if error > 1e-4:
                raise UserError(f"extract: hidden states differ by {error:.1e} from transformers'")
            sides = {
                "ours": lambda n=number, s=seconds: list(ours(n, s)),
                "peer": lambda n=number, s=seconds: list(transformers(n, s)),
            }
            times = measure.interleaved(sides, REPEATS[case])
            mib = _peak(ours, number, seconds), _peak(transformers, number, seconds)
            peer = "transformers HubertModel"
            yield measure.row(f"extract_{case}", peer, times["ours"], times["peer"], mib)


if __name__ == "__main__":
    for row in rows(sys.argv[1:] or tuple(CASES)):
        print(row, flush=True)
