"""Features of musicnn, a tagger trained with labels (Pons & Serra 2019, arXiv 1909.06654).

Its network and input are those of jordipons/musicnn (`musicnn/models.py`, `extractor.py`), its
weights the TensorFlow checkpoints of the wheel on PyPI. The mel spectrum is float32, as in
MTG/essentia; the original's float16 overflows for loud music (Inf from peaks of -10 dB).

Shapes: B patches, N samples at 16 kHz, T = N // 256 + 1 frames, F bands, C channels, D = 753 widths
of a frame (front end 561, and three layers of 64).
"""

import pathlib
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mert_jax.errors import UserError
from mert_jax.models import spectrograms
from mert_jax.tensors import tf_checkpoint

Array = jax.Array
SAMPLE_RATE = 16_000
N_FFT, HOP, N_MELS = 512, 256, 96
PATCH = 187  # frames, 3 s: what it was trained on
# In frames of a long recording: temporal filters reach 64 frames, the three later layers 3 each
PART, REACH = 1024, 73
NORM = ("gamma", "beta", "moving_mean", "moving_variance")
EPSILON = 1e-3  # of tf.layers.batch_normalization
WAY_OUT = (
    "the weights come with `pip download --no-deps musicnn`; --musicnn takes that .whl, the folder "
    "it was unzipped to, or the MSD_musicnn or MTT_musicnn in it"
)


def load(path: str) -> dict[str, Any]:
    """Load the weights at `path`: the .whl, its folder (MSD_musicnn of both), or a model's folder.

    Return `norms`, (scale [C], shift [C]), `layers`, (kernel [T, F, 1, C], bias [C]), both in the
    network's order, and `filters` of the mel spectrum. Raises UserError if `path` has no weights.
    """
    try:
        root = zipfile.Path(path) if path.endswith(".whl") else pathlib.Path(path)
        folders = (root / "musicnn" / "MSD_musicnn", root / "MSD_musicnn", root)
        folder = next((x for x in folders if (x / ".index").is_file()), root)
        tensors = tf_checkpoint.read_tf_checkpoint(folder)
        params = {
            "norms": [_norm(*_read(tensors, "batch_normalization", i, NORM)) for i in range(9)],
            "layers": [_read(tensors, "conv2d", i, ("kernel", "bias")) for i in range(8)],
        }
    except (OSError, zipfile.BadZipFile, KeyError, UserError) as e:
        problem = f"another model, without {e}" if isinstance(e, KeyError) else e
        raise UserError(f"--musicnn={path} is not musicnn: {problem}; {WAY_OUT}") from e
    params["filters"] = spectrograms.mel_filters(SAMPLE_RATE, N_FFT, N_MELS)
    return jax.tree.map(jnp.asarray, params)


def _read(tensors: dict[str, np.ndarray], kind: str, i: int, parts: tuple) -> list[np.ndarray]:
    return [tensors[f"{kind}_{i}/{part}" if i else f"{kind}/{part}"] for part in parts]


def _norm(gamma: Any, beta: Any, mean: Any, variance: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale and shift of a trained batch norm."""
    scale = gamma / np.sqrt(variance + np.float32(EPSILON))
    return scale, beta - mean * scale


@jax.jit
def _log_mel(filters: Array, wave: Array) -> Array:
    power = spectrograms.power_spectrum(wave[None], N_FFT, HOP)
    mel = jnp.einsum("btf,fm->btm", power, filters, precision="highest")
    return jnp.log10(10_000 * mel[0] + 1)


def log_mel(params: dict[str, Any], wave: np.ndarray) -> np.ndarray:
    """Return the network's input for `wave` f32 [N]: log10(1 + 10,000 mel power) [T, 96]."""
    # padding to whole seconds limits the number of compiled lengths
    padded = np.pad(wave, (0, -len(wave) % SAMPLE_RATE)).astype(np.float32)
    return np.asarray(_log_mel(params["filters"], padded))[: len(wave) // HOP + 1]


def _layer(x: Array, layer: tuple[Array, Array], norm: tuple[Array, Array]) -> Array:
    """Convolve over time, apply ReLU and batch norm, and take the maximum over bands.

    [B, T, F] -> [B, T, C]; only timbral and temporal filters are less high than their input.
    """
    (kernel, bias), (scale, shift) = layer, norm
    length = len(kernel)
    options = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest")
    padding = (((length - 1) // 2, length // 2), (0, 0))
    y = jax.lax.conv_general_dilated(x[..., None], kernel, (1, 1), padding, **options)
    y = jax.nn.relu(y + bias[None, None, None])
    # the norm comes before the maximum, because some of its scales are negative
    return (y * scale[None, None, None] + shift[None, None, None]).max(2)


@jax.jit
def network(params: dict[str, Any], x: Array) -> Array:
    """Return the joined outputs of all layers for log-mel patches `x` [B, T, 96]: [B, T, D]."""
    ((scale, shift), *norms), layers = params["norms"], params["layers"]
    x = x * scale[None, None] + shift[None, None]
    front = jnp.concatenate([_layer(x, layers[i], norms[i]) for i in range(5)], -1)
    outputs = [front, _layer(front, layers[5], norms[5])]
    for i in (6, 7):
        outputs.append(outputs[-1] + _layer(outputs[-1], layers[i], norms[i]))
    return jnp.concatenate(outputs, -1)


def pooled(params: dict[str, Any], wave: np.ndarray) -> np.ndarray:
    """Return mean and maximum over time of the network's frames, averaged over patches: [2 * D].

    As commonly probed (Castellon et al. 2021; p-lambda/jukemir), but patches of 3 s overlap a
    little where the original drops the rest of a wave. A shorter wave is repeated, as in training.
    """
    mel = log_mel(params, wave)
    if len(mel) < PATCH:
        mel = mel[np.arange(PATCH) % len(mel)]
    starts = np.linspace(0, len(mel) - PATCH, -(-len(mel) // PATCH)).round().astype(int)
    # one at a time: the same program for any length of wave
    outputs = [network(params, mel[None, start : start + PATCH])[0] for start in starts]
    return np.mean([np.concatenate([x.mean(0), x.max(0)]) for x in map(np.asarray, outputs)], 0)


def frames(params: dict[str, Any], wave: np.ndarray) -> np.ndarray:
    """Return the network's frames of a whole recording, without the borders of patches: [T, D]."""
    mel = log_mel(params, wave)
    last = max(0, len(mel) - PART)  # the last part is as long as the others
    starts = range(0, max(1, len(mel) - 2 * REACH), PART - 2 * REACH)
    starts = [min(start, last) for start in starts]
    # parts overlap by the network's reach on either side
    stops = [start + REACH for start in starts[1:]] + [len(mel)]
    outputs, done = [], 0
    for start, stop in zip(starts, stops, strict=True):
        part = np.asarray(network(params, mel[None, start : start + PART])[0])
        outputs.append(part[done - start : stop - start])
        done = stop
    return np.concatenate(outputs)
