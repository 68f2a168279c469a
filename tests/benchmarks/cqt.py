"""The CQT teacher against nnAudio's CQT1992v2 and librosa.cqt: 8 clips of 5 s, on the CPU.

python -m tests.benchmarks.cqt
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from mert_jax.errors import UserError
from tests.benchmarks import measure

CLIPS, SAMPLES = 8, 120_000
SIZES = dict(hop_length=320, fmin=32.7, n_bins=336, bins_per_octave=48)


def _music() -> np.ndarray:
    """Decaying partials and a little noise, f32 [CLIPS, SAMPLES]."""
    rng = np.random.default_rng(0)
    t = np.arange(SAMPLES) / 24_000
    frequency = 40 * 100 ** rng.random((CLIPS, 8, 1))
    partials = np.sin(2 * np.pi * frequency * t) * np.exp(-2 * ((t * 3) % 1))
    return (0.05 * partials.sum(1) + 0.01 * rng.normal(size=(CLIPS, SAMPLES))).astype(np.float32)


# each side's process imports its own libraries only
def ours() -> Callable[[], np.ndarray]:
    """Build a call of mert_jax."""
    import jax

    from mert_jax import teachers

    teacher = teachers.make("cqt")
    apply = jax.jit(teacher.apply)
    params, wave = jax.device_put((teacher.params, _music()))
    return lambda: np.asarray(apply(params, wave))


def nnaudio() -> Callable[[], np.ndarray]:
    """Build a call of nnAudio."""
    import torch
    from nnAudio.features.cqt import CQT1992v2

    torch.set_num_threads(measure.THREADS)
    layer = CQT1992v2(sr=24_000, **SIZES, pad_mode="constant", verbose=False)
    wave = torch.tensor(_music())

    def run() -> np.ndarray:
        with torch.no_grad():
            return layer(wave).numpy().swapaxes(1, 2)

    return run


def librosa() -> Callable[[], np.ndarray]:
    """Build a call of librosa on all clips, which is faster than one call per clip."""
    from librosa import cqt

    wave = _music()
    return lambda: np.abs(cqt(wave, sr=24_000, **SIZES)).swapaxes(1, 2)


def _row(name: str, peer: str, theirs: Callable, tolerance: float) -> dict[str, Any]:
    error = measure.relative_l2(ours()(), theirs()())
    if error > tolerance:
        raise UserError(f"{name}: ours is {error:.1e} away from {peer}, more than {tolerance}")
    times = measure.apart({"ours": (ours,), "peer": (theirs,)})
    return measure.row(name, peer, times["ours"], times["peer"])


def nnaudio_rows() -> list[dict[str, Any]]:
    """The row `cqt_nnaudio`: seconds for the batch."""
    try:
        return [_row("cqt_nnaudio", "nnAudio CQT1992v2", nnaudio, 1e-4)]
    except ImportError as error:
        raise UserError(f"cqt_nnaudio: {error}; pip install mert_jax[peers]") from error


def librosa_rows() -> list[dict[str, Any]]:
    """The row `cqt_librosa`: seconds for the batch."""
    return [_row("cqt_librosa", "librosa.cqt", librosa, 2e-2)]


if __name__ == "__main__":
    for row in [*nnaudio_rows(), *librosa_rows()]:
        print(row)
