"""The RVQ-VAE teacher against transformers' EnCodec: codes at 6 kbps of 8 clips of 5 s, on the CPU.

python -m tests.benchmarks.rvq_vae
"""

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from mert_jax.errors import UserError
from tests.benchmarks import measure

CLIPS, SAMPLES, BOOKS = 8, 120_000, 8


def music(clips: int, samples: int) -> np.ndarray:
    """Chords and noise at 24 kHz, f32 [clips, samples]."""
    rng = np.random.default_rng(0)
    t = np.arange(samples) / 24_000
    chords = np.sin(2 * np.pi * rng.uniform(80, 800, (clips, 4, 1)) * t).sum(1)
    return (0.1 * chords + 0.1 * rng.normal(size=(clips, samples))).astype(np.float32)


def write_checkpoint(folder: str) -> None:
    """Write a full-size EnCodec with random weights and codebooks spread like its latents."""
    import jax
    import jax.numpy as jnp

    from mert_jax.models import encodec as codec
    from mert_jax.teachers import encodec_checkpoint

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
    encodec_checkpoint.write_encodec(folder, jax.tree.map(np.asarray, params))


# each side's process imports its own libraries only
def ours(checkpoint: str) -> Callable[[], np.ndarray]:
    """Build a call of mert_jax: codes [CLIPS, T, BOOKS]."""
    import jax

    from mert_jax import teachers

    teacher = teachers.make("rvq_vae", checkpoint=checkpoint)
    apply = jax.jit(teacher.apply)
    params, wave = jax.device_put((teacher.params, music(CLIPS, SAMPLES)))
    return lambda: np.asarray(apply(params, wave))


def transformers(checkpoint: str) -> Callable[[], np.ndarray]:
    """Build a call of transformers with the same result."""
    import torch
    from transformers import EncodecModel

    torch.set_num_threads(measure.THREADS)
    model = EncodecModel.from_pretrained(checkpoint).eval()
    wave = torch.tensor(music(CLIPS, SAMPLES))[:, None]

    def run() -> np.ndarray:
        with torch.no_grad():
            return model.encode(wave, bandwidth=6.0).audio_codes[0].numpy().swapaxes(1, 2)

    return run


def rows() -> list[dict[str, Any]]:
    """Yield the row `rvq_vae`: seconds for the batch.

    Raises UserError if more than one code in a thousand differs; a few nearly tied ones may.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder)
        try:
            other = float(np.mean(ours(folder)() != transformers(folder)()))
        except ImportError as error:
            raise UserError(f"rvq_vae: {error}; pip install mert_jax[peers]") from error
        if other > 1e-3:
            raise UserError(f"rvq_vae: {other:.1%} of our codes are not transformers'")
        times = measure.apart({"ours": (ours, folder), "peer": (transformers, folder)})
    return [measure.row("rvq_vae", "transformers EncodecModel", times["ours"], times["peer"])]


if __name__ == "__main__":
    for row in rows():
        print(row)
