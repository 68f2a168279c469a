"""Features of musicnn, a tagger trained with labels (Pons & Serra 2019, arXiv 1909.06654).

Its network and input are those of jordipons/musicnn (`musicnn/models.py`, `extractor.py`), its
weights the TensorFlow checkpoints of the wheel on PyPI. One thing differs: the original rounds the
mel spectrum to float16, which overflows for loud music (Inf from peaks of -10 dB); here it is
float32, as in the same group's own port (MTG/essentia, TensorflowInputMusiCNN).

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
EPSILON = 1e-3  # of tf.layers.batch_normalization
WAY_OUT = (
    "the weights come with `pip download --no-deps musicnn`; --musicnn takes that .whl, the folder "
    "it was unzipped to, or the MSD_musicnn or MTT_musicnn in it"
)


def load(path: str) -> dict[str, Any]:
    """Load the weights at `path`: the .whl, its folder (MSD_musicnn of both), or a model's folder.

    Return `norms`, (scale [C], shift [C]) of the batch norms, `layers`, (kernel [T, F, 1, C],
    bias [C]) of the convolutions, both in the network's order, and `filters` of the mel spectrum.
    Raises UserError if `path` has no weights.
    """
    try:
        root = zipfile.Path(path) if path.endswith(".whl") else pathlib.Path(path)
    except (OSError, zipfile.BadZipFile) as e:
        raise UserError(f"--musicnn={path}: {e}; {WAY_OUT}") from e
    inside = [root / "musicnn" / "MSD_musicnn", root / "MSD_musicnn", root]
    folders = [folder for folder in inside if (folder / ".index").is_file()]
    if not folders:
        raise UserError(f"--musicnn={path} has no musicnn; {WAY_OUT}")
    try:
        tensors = tf_checkpoint.read_tf_checkpoint(folders[0])
        params = {
            "norms": [_norm(tensors, i) for i in range(9)],
            "layers": [
                [tensors[_name("conv2d", i, x)] for x in ("kernel", "bias")] for i in range(8)
            ],
        }
    except KeyError as e:
        raise UserError(f"--musicnn={path} is another model, without {e}; {WAY_OUT}") from e
    except UserError as e:
        raise UserError(f"--musicnn={path}: {e}; {WAY_OUT}") from e
    params["filters"] = spectrograms.mel_filters(SAMPLE_RATE, N_FFT, N_MELS)
    return jax.tree.map(jnp.asarray, params)


def _name(kind: str, i: int, part: str) -> str:
    return f"{kind}_{i}/{part}" if i else f"{kind}/{part}"


def _norm(tensors: dict[str, np.ndarray], i: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale and shift of a trained batch norm."""
    parts = ("gamma", "beta", "moving_mean", "moving_variance")
    gamma, beta, mean, variance = (tensors[_name("batch_normalization", i, x)] for x in parts)
    scale = gamma / np.sqrt(variance + np.float32(EPSILON))
    return scale, beta - mean * scale


@jax.jit
def _log_mel(filters: Array, wave: Array) -> Array:
    power = spectrograms.power_spectrum(wave, N_FFT, HOP)
    mel = jnp.einsum("btf,fm->btm", power, filters, precision="highest")
    return jnp.log10(10_000 * mel + 1)


def log_mel(params: dict[str, Any], wave: np.ndarray) -> np.ndarray:
    """Return the network's input for `wave` f32 [N]: log10(1 + 10,000 mel power) [T, 96]."""
    # padding to whole seconds limits the number of compiled lengths
    padded = np.pad(wave, (0, -len(wave) % SAMPLE_RATE)).astype(np.float32)
    return np.asarray(_log_mel(params["filters"], padded[None])[0, : len(wave) // HOP + 1])


def _layer(x: Array, layer: tuple[Array, Array], norm: tuple[Array, Array]) -> Array:
    """Convolve over time, apply ReLU and batch norm, and take the maximum over bands.

    [B, T, F] -> [B, T, C]. Timbral filters are 7 frames long, temporal ones one band high, and
    those of the middle layers as high as their input.
    """
    kernel, bias = layer
    length = kernel.shape[0]
    y = jax.lax.conv_general_dilated(
        x[..., None],
        kernel,
        window_strides=(1, 1),
        padding=(((length - 1) // 2, length // 2), (0, 0)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    scale, shift = norm
    y = jax.nn.relu(y + bias[None, None, None])
    # the norm comes before the maximum, because some of its scales are negative
    return (y * scale[None, None, None] + shift[None, None, None]).max(2)


@jax.jit
def network(params: dict[str, Any], x: Array) -> Array:
    """Return the outputs of all layers for log-mel patches `x` [B, T, 96], joined: [B, T, D].

    The original calls them timbral, temporal, cnn1, cnn2 and cnn3.
    """
    norms, layers = params["norms"], params["layers"]
    scale, shift = norms[0]
    x = x * scale[None, None] + shift[None, None]
    front = jnp.concatenate([_layer(x, layers[i], norms[i + 1]) for i in range(5)], -1)
    outputs = [front, _layer(front, layers[5], norms[6])]
    for i in (6, 7):
        outputs.append(outputs[-1] + _layer(outputs[-1], layers[i], norms[i + 1]))
    return jnp.concatenate(outputs, -1)


def pooled(params: dict[str, Any], wave: np.ndarray) -> np.ndarray:
    """Return mean and maximum over time of the network's frames, averaged over patches: [2 * D].

    These features, mean_pool and max_pool, are commonly probed (Castellon et al. 2021, arXiv
    2107.05677; p-lambda/jukemir, `representations/musicnn/main.py`). Patches of 3 s overlap a
    little where the original would drop the rest of a wave. A shorter wave is repeated, as in
    training (its config.json: repeat-pad).
    """
    mel = log_mel(params, wave)
    if len(mel) < PATCH:
        mel = mel[np.arange(PATCH) % len(mel)]
    starts = np.linspace(0, len(mel) - PATCH, -(-len(mel) // PATCH)).round().astype(int)
    # one at a time: the same program for any length of wave
    outputs = [network(params, mel[None, start : start + PATCH])[0] for start in starts]
    return np.mean([np.concatenate([x.mean(0), x.max(0)]) for x in map(np.asarray, outputs)], 0)


def frames(params: dict[str, Any], wave: np.ndarray) -> np.ndarray:
    """Return the network's frames of a whole recording, without the borders of patches: [T, D].

    A long one is computed in parts that overlap by the network's reach on either side.
    """
    mel = log_mel(params, wave)
    parts: list[np.ndarray] = []
    for start in range(0, max(1, len(mel) - 2 * REACH), PART - 2 * REACH):
        start = max(0, min(start, len(mel) - PART))  # the last part is as long as the others
        part = np.asarray(network(params, mel[None, start : start + PART])[0])
        done = start + REACH if start else 0  # earlier frames lack the input before this part
        parts = [x[:done] for x in parts] + [part[done - start :]]
        parts = [np.concatenate(parts)]
    return parts[0]
