"""The RVQ-VAE teacher against transformers' EnCodec: codes at 6 kbps of 8 clips of 5 s, on the CPU.

python -m tests.benchmarks.rvq_vae
"""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from mert_jax.cli import UserError
from tests.benchmarks import measure

CLIPS, SAMPLES, BOOKS = 8, 120_000, 8
CHECKPOINT = "MERT_JAX_BENCHMARK_CHECKPOINT"  # a variable: processes measured for memory inherit it


def music(clips: int, samples: int) -> np.ndarray:
    """Chords and noise at 24 kHz, f32 [clips, samples]."""
    rng = np.random.default_rng(0)
    t = np.arange(samples) / 24_000
    chords = np.sin(2 * np.pi * rng.uniform(80, 800, (clips, 4, 1)) * t).sum(1)
    return (0.1 * chords + 0.1 * rng.normal(size=(clips, samples))).astype(np.float32)


def write_checkpoint(folder: str) -> None:
    """Write an EnCodec of full size and random weights, its codebooks spread like its latents."""
    import jax
    import jax.numpy as jnp

    from mert_jax import codec, encodec

    keys = jax.random.split(jax.random.key(0), 3)
    encoder, decoder = codec.Encoder(), codec.Decoder()
    wave = music(1, 24_000)
    variables = jax.jit(encoder.init)(keys[0], wave)
    latents = jax.jit(encoder.apply)(variables, wave)[0]
    books = 0.5 * latents.std(0) * jax.random.normal(keys[2], (BOOKS, 1024, 128))
    params = {
        "encoder": variables["params"],
        "decoder": jax.jit(decoder.init)(keys[1], jnp.zeros((1, 8, 128)))["params"],
        "codebooks": books.at[0].add(latents.mean(0)),
    }
    encodec.write(folder, jax.tree.map(np.asarray, params))


# the libraries are imported where they are used: a process measured for memory has its own only
def _ours() -> Callable[[], np.ndarray]:
    import jax

    from mert_jax import teachers

    teacher = teachers.make("rvq_vae", checkpoint=os.environ[CHECKPOINT])
    apply = jax.jit(teacher.apply)
    params, wave = jax.device_put((teacher.params, music(CLIPS, SAMPLES)))
    return lambda: np.asarray(apply(params, wave))


def _transformers() -> Callable[[], np.ndarray]:
    import torch
    from transformers import EncodecModel

    torch.set_num_threads(measure.THREADS)
    model = EncodecModel.from_pretrained(os.environ[CHECKPOINT]).eval()
    wave = torch.tensor(music(CLIPS, SAMPLES))[:, None]

    def run() -> np.ndarray:
        with torch.no_grad():
            return model.encode(wave, bandwidth=6.0).audio_codes[0].numpy().swapaxes(1, 2)

    return run


def run_ours() -> None:
    """What `ours_mib` is the peak of."""
    _ours()()


def run_transformers() -> None:
    """What `peer_mib` is the peak of."""
    _transformers()()


def rows() -> list[dict[str, Any]]:
    """The row `rvq_vae`: seconds for the batch; UserError when more than one code in a thousand is
    another, as a few nearly tied ones are."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder)
        os.environ[CHECKPOINT] = folder
        try:
            theirs = _transformers()
        except ImportError as error:
            raise UserError(f"rvq_vae: {error}; pip install mert_jax[peers]") from error
        ours = _ours()
        other = float(np.mean(ours() != theirs()))
        if other > 1e-3:
            raise UserError(f"rvq_vae: {other:.1%} of our codes are not transformers'")
        seconds = measure.interleaved({"ours": ours, "peer": theirs})
        mib = measure.peak_mib(run_ours), measure.peak_mib(run_transformers)
    peer = "transformers EncodecModel"
    return [measure.row("rvq_vae", peer, seconds["ours"], seconds["peer"], mib)]


if __name__ == "__main__":
    for row in rows():
        print(row)
