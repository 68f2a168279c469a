"""A small student of 1,200 frames a second as a checkpoint, and noise for it to hear."""

import jax
import numpy as np

from mert_jax.checkpoints import in_memory
from tests import checkpoint_samples

RATE = 1_200  # frames a second of the small student: 24 kHz, every 20 samples


def checkpoint(flavour="95m", normalised=False):
    student = checkpoint_samples.student(**checkpoint_samples.FLAVOURS[flavour])
    params = jax.tree.map(lambda x: 0.3 * x, checkpoint_samples.params_of(student))
    about = in_memory.About(do_normalize=normalised)
    return in_memory.Checkpoint(student, params, None, 5, about)


def music(*lengths, seed=0):
    """Noise that grows louder, with an offset: parts of it have other norms than the whole."""
    rng = np.random.default_rng(seed)
    return [
        (0.1 * rng.normal(size=n) * np.linspace(0.1, 1, n) + 0.02).astype(np.float32)
        for n in lengths
    ]
