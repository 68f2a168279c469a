"""musicnn: against its definition in numpy with small weights, and against TensorFlow with its own.

tf_files/musicnn.npz: outputs of the wheel's own code (musicnn 0.1.0, all patches in one batch: in
later ones it repeats the first's penultimate and cnn1 to cnn3), as it is ("_half") and with the mel
spectrum left in float32, under TensorFlow 2.21 and librosa 0.11.
"""

import os
import pathlib
import zipfile

import jax
import librosa
import numpy as np
import pytest

from mert_jax.errors import UserError
from mert_jax.probing import features, musicnn
from mert_jax.tensors import tf_checkpoint
from tests import tf_checkpoints

GOLDEN = pathlib.Path(__file__).parents[1] / "tf_files" / "musicnn.npz"
KERNELS = [(7, 38, 1, 4), (7, 67, 1, 4), (128, 1, 1, 3), (64, 1, 1, 3), (32, 1, 1, 3)]
KERNELS += [(7, 17, 1, 5), (7, 5, 1, 5), (7, 5, 1, 5)]
WIDTH = 17 + 3 * 5


def tensor_name(kind, i, part):
    return f"{kind}{f'_{i}' if i else ''}/{part}"


def wave(seconds: float = 6.0) -> np.ndarray:
    """f32 at 16 kHz, two tones and beats of noise: quiet enough for float16."""
    time = np.arange(round(seconds * 16_000)) / 16_000
    tones = np.sin(2 * np.pi * (200 * time + 60 * time**2))
    tones += np.sin(2 * np.pi * 3000 * np.sqrt(time + 1))
    noise = np.random.default_rng(0).uniform(-1, 1, len(time))
    return (0.02 * tones + 0.05 * noise * np.exp(-20 * (time % 0.5))).astype(np.float32)


def small_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    found = {"beta1_power": np.float32(0.9)}
    for i, shape in enumerate(KERNELS):
        scale = 1 / np.sqrt(np.prod(shape[:3]))
        found[tensor_name("conv2d", i, "kernel")] = scale * rng.standard_normal(shape)
        found[tensor_name("conv2d", i, "bias")] = 0.1 * rng.standard_normal(shape[-1])
    for i, size in enumerate([1] + [shape[-1] for shape in KERNELS]):
        for part in ("gamma", "beta", "moving_mean"):
            found[tensor_name("batch_normalization", i, part)] = rng.standard_normal(size)
        found[tensor_name("batch_normalization", i, "moving_variance")] = rng.uniform(0, 0.1, size)
    return {name: np.asarray(x, np.float32) for name, x in found.items()}


def norm(tensors, i, x):
    gamma, beta, mean, variance = (
        tensors[tensor_name("batch_normalization", i, part)].astype(np.float64)
        for part in ("gamma", "beta", "moving_mean", "moving_variance")
    )
    return (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta


def layer(tensors, i, x):
    """[T, F] -> [T, C], by sums over windows of the padded input."""
    kernel = tensors[tensor_name("conv2d", i, "kernel")][:, :, 0].astype(np.float64)
    length, bands, _ = kernel.shape
    before = (length - 1) // 2  # TensorFlow's "SAME": of an even length, more comes after
    padded = np.pad(x, ((before, length - 1 - before), (0, 0)))
    found = np.empty((len(x), x.shape[1] - bands + 1, kernel.shape[2]))
    for band in range(found.shape[1]):
        for frame in range(len(x)):
            window = padded[frame : frame + length, band : band + bands]
            found[frame, band] = np.tensordot(window, kernel, 2)
    found = np.maximum(found + tensors[tensor_name("conv2d", i, "bias")], 0)
    return norm(tensors, i + 1, found).max(1)


def expected_frames(tensors, mel):
    x = norm(tensors, 0, mel.astype(np.float64))
    front = np.concatenate([layer(tensors, i, x) for i in range(5)], 1)
    first = layer(tensors, 5, front)
    second = layer(tensors, 6, first) + first
    third = layer(tensors, 7, second) + second
    return np.concatenate([front, first, second, third], 1)


def tags(tensors, pools):
    """What the network ends in: the layer before the last, and tags, of pools [patches, 2 * D]."""
    mean, most = np.split(pools, 2, 1)
    x = np.stack([most, mean], -1).reshape(len(pools), -1)
    x = norm(tensors, 9, x) @ tensors["dense/kernel"] + tensors["dense/bias"]
    x = norm(tensors, 10, np.maximum(x, 0))
    logits = x @ tensors["dense_1/kernel"] + tensors["dense_1/bias"]
    return x, 1 / (1 + np.exp(-logits))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "musicnn" / "MSD_musicnn"
    tf_checkpoints.write(folder, small_weights())
    return str(folder)


def test_log_mel_is_the_extractors(small):
    heard = wave(1.3)
    mel = librosa.feature.melspectrogram(y=heard, sr=16_000, n_fft=512, hop_length=256, n_mels=96)
    found = musicnn.log_mel(musicnn.load(small), heard)
    np.testing.assert_allclose(found, np.log10(10_000 * mel.T + 1), atol=1e-5)


def test_the_network_is_its_definition(small):
    tensors, params = small_weights(), musicnn.load(small)
    mel = np.random.default_rng(2).uniform(0, 4, (150, 96)).astype(np.float32)
    found = np.asarray(musicnn.network(params, mel[None])[0])
    assert found.shape == (150, WIDTH)
    np.testing.assert_allclose(found, expected_frames(tensors, mel), rtol=1e-4, atol=2e-3)


def test_patches_are_pooled_one_by_one(small):
    """Two whole ones; three where a rest is left; a short wave again and again."""
    params = musicnn.load(small)
    for seconds, starts in ((2 * 187 * 0.016 - 0.01, (0, 187)), (6.0, (0, 94, 189)), (1.0, (0,))):
        heard = wave(seconds)
        mel = musicnn.log_mel(params, heard)
        mel = np.concatenate([mel] * 3)[:187] if len(mel) < 187 else mel
        parts = [mel[start : start + 187] for start in starts]
        assert {len(part) for part in parts} == {187}
        found = [np.asarray(musicnn.network(params, part[None])[0]) for part in parts]
        expected = [np.mean([x.mean(0) for x in found], 0), np.mean([x.max(0) for x in found], 0)]
        pooled = musicnn.pooled(params, heard)
        np.testing.assert_allclose(pooled, np.concatenate(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [100, 1025, 1902])
def test_frames_in_pieces_are_those_of_the_whole(small, count):
    params = musicnn.load(small)
    heard = wave((count - 1) * 0.016)
    found = musicnn.frames(params, heard)
    assert len(found) == count
    whole = np.asarray(musicnn.network(params, musicnn.log_mel(params, heard)[None])[0])
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-4)


def test_as_features(small, tmp_path):
    made = features.tagger(small)
    assert (made.sample_rate, made.frame_rate, made.layers) == (16_000, 62.5, 1)
    (found,) = made.pooled(iter([wave(2.0)]))
    assert found.shape == (1, 2 * WIDTH)
    (frames,) = made.frames(iter([wave(2.0)]))
    assert frames.shape == (1, 126, WIDTH)
    other = small_weights() | {"conv2d/bias": np.zeros(4, np.float32)}
    tf_checkpoints.write(tmp_path, other)
    assert features.tagger(str(tmp_path)).fingerprint != made.fingerprint


def test_a_path_is_a_wheel_its_folder_or_a_models(small, tmp_path):
    wheel = tmp_path / "musicnn-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in pathlib.Path(small).iterdir():
            archive.write(file, f"musicnn/MSD_musicnn/{file.name}")
    root = pathlib.Path(small).parent.parent
    for path in (wheel, root, root / "musicnn"):
        for a, b in zip(*map(jax.tree.leaves, map(musicnn.load, (small, str(path)))), strict=True):
            np.testing.assert_array_equal(a, b)


def test_mistakes_say_where_the_weights_are(tmp_path):
    (tmp_path / "no.whl").write_text("no archive")
    tf_checkpoints.write(tmp_path / "vgg", {"1CNN/kernel": np.zeros(3, np.float32)})
    tf_checkpoints.write(tmp_path / "cut", small_weights())
    (tmp_path / "cut" / tf_checkpoint.DATA).write_bytes(b"")
    for name in ("missing", "missing.whl", "no.whl", "", "vgg", "cut"):
        with pytest.raises(UserError, match="pip download --no-deps musicnn") as caught:
            musicnn.load(str(tmp_path / name))
        assert str(tmp_path) in str(caught.value)
    for baselines, path in ((["musicnn"], ""), (["cqt"], "somewhere")):
        with pytest.raises(UserError, match=r"need each other; .*pip download --no-deps musicnn"):
            features.make("", baselines, musicnn_at=path)


@pytest.mark.skipif(
    not os.environ.get("MERT_JAX_MUSICNN"),
    reason="pip download --no-deps musicnn && unzip musicnn-*.whl -d DIR; MERT_JAX_MUSICNN=DIR",
)
@pytest.mark.parametrize("model", ["MSD_musicnn", "MTT_musicnn"])
def test_the_wheels_weights_give_what_tensorflow_gives(model):
    folder = pathlib.Path(os.environ["MERT_JAX_MUSICNN"]) / "musicnn" / model
    tensors, params = tf_checkpoint.read_tf_checkpoint(folder), musicnn.load(str(folder))
    golden, heard = np.load(GOLDEN), wave()
    np.testing.assert_array_equal(heard[::1000], golden["wave"])
    mel = musicnn.log_mel(params, heard)
    np.testing.assert_allclose(mel[::37], golden["mel"], atol=2e-6)
    found = np.asarray(musicnn.network(params, mel[: 2 * 187].reshape(2, 187, 96)))
    pools = np.concatenate([found.mean(1), found.max(1)], 1)
    penultimate, taggram = tags(tensors, pools)

    def close(x, name, rtol, atol):
        return np.testing.assert_allclose(x, golden[f"{model}/{name}"], rtol, atol, err_msg=name)

    close(found.reshape(2 * 187, -1)[::37], "frames", 1e-5, 3e-4)
    close(pools[:, :753], "mean_pool", 1e-5, 1e-4)
    close(pools[:, 753:], "max_pool", 1e-5, 3e-4)
    close(penultimate, "penultimate", 0, 1e-4)
    close(taggram, "taggram", 0, 1e-5)
    # the wheel's own rounding to float16
    close(penultimate, "penultimate_half", 0, 5e-3)
    close(taggram, "taggram_half", 0, 5e-4)
