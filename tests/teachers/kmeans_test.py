"""The k-means teacher: codes of librosa's features, the fitted file, and the clustering."""

import json
import os

import jax
import librosa
import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.cluster import KMeans

from mert_jax import teachers
from mert_jax.errors import UserError
from mert_jax.fitting import clusters
from mert_jax.teachers import fitted_file, kmeans

SIZES = dict(mel_size=30, chroma_size=20)


def _tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "log_mel_centres": rng.normal(3, 2, (30, 229)).astype(np.float32),
        "chroma_centres": rng.uniform(0, 1, (20, 264)).astype(np.float32),
    }


@pytest.fixture
def checkpoint(tmp_path) -> str:
    fitted_file.write_fitted(str(tmp_path), "kmeans", _tensors(), kmeans.SETTINGS | SIZES)
    return str(tmp_path)


def _wave(seconds: float) -> np.ndarray:
    t = np.arange(int(seconds * 24_000)) / 24_000
    return (0.2 * np.sin(2 * np.pi * 200 * t * (1 + t)) * (t % 0.4)).astype(np.float32)


def test_codes_are_the_nearest_centres_to_librosas_features(checkpoint):
    teacher = teachers.make("kmeans", checkpoint=checkpoint)
    wave = _wave(1.01)
    codes = np.asarray(jax.jit(teacher.apply)(teacher.params, wave[None]))
    assert codes.dtype == np.int32
    assert codes.shape == (1, len(wave) // 320 + 1, 2)
    assert teacher.size == 30
    wave = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
    options = dict(sr=24_000, n_fft=2048, hop_length=320)
    mel = librosa.feature.melspectrogram(y=wave, n_mels=229, pad_mode="constant", **options)
    chroma = librosa.feature.chroma_stft(y=wave, n_chroma=264, tuning=0.0, **options)
    for book, (x, centres) in enumerate(
        zip((np.log(mel.T + 1e-5), chroma.T), _tensors().values(), strict=True)
    ):
        distances = np.square(x[:, None] - centres).sum(-1)
        # rounding may choose another of two equally near centres
        chosen = np.take_along_axis(distances, codes[0, :, book : book + 1], 1)[:, 0]
        np.testing.assert_allclose(chosen, distances.min(1), rtol=1e-4)
        assert (codes[0, :, book] == distances.argmin(1)).mean() > 0.98


def test_codes_do_not_depend_on_the_level_of_a_clip(checkpoint):
    teacher = teachers.make("kmeans", checkpoint=checkpoint)
    wave = _wave(1)
    codes = jax.jit(teacher.apply)(teacher.params, np.stack([wave, 0.1 * wave]))
    assert (codes[0] == codes[1]).mean() > 0.98


def test_equal_teachers_give_equal_bytes(tmp_path):
    tensors = _tensors()
    # an array that is not contiguous must be written by its values
    reordered = {key: np.asfortranarray(value) for key, value in reversed(tensors.items())}
    one = fitted_file.write_fitted(str(tmp_path / "a"), "kmeans", tensors, kmeans.SETTINGS | SIZES)
    two = fitted_file.write_fitted(
        str(tmp_path / "b"), "kmeans", reordered, SIZES | kmeans.SETTINGS | SIZES
    )
    with open(one, "rb") as a, open(two, "rb") as b:
        assert a.read() == b.read()
    assert os.listdir(tmp_path / "a") == [fitted_file.FILE]
    assert os.stat(one).st_mode & 0o044 == 0o044 & ~_umask()


def _umask() -> int:
    os.umask(before := os.umask(0))
    return before


@pytest.mark.parametrize("name", ["kmeans", "mel_rvq"])
def test_the_error_without_checkpoint_names_the_command(name):
    with pytest.raises(UserError, match=f"needs checkpoint=PATH.*--teacher={name} "):
        teachers.make(name)


def test_all_wrong_arrays_are_named(tmp_path):
    wrong = {"log_mel_centres": np.zeros((30, 9)), "other": np.zeros(2)}
    fitted_file.write_fitted(str(tmp_path), "kmeans", wrong, kmeans.SETTINGS | SIZES)
    message = (
        r"chroma_centres is missing, not float32 \[20, 264\]; "
        r"log_mel_centres is float32 \[30, 9\], not float32 \[30, 229\]; "
        r"other is float32 \[2\], not expected"
    )
    with pytest.raises(UserError, match=message):
        teachers.make("kmeans", checkpoint=str(tmp_path))


def test_other_files_are_refused(tmp_path, checkpoint):
    with pytest.raises(UserError, match="no fitted teacher in"):
        teachers.make("kmeans", checkpoint=str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="holds teacher 'kmeans', not 'mel_rvq'"):
        teachers.make("mel_rvq", checkpoint=checkpoint)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": np.zeros(3)}, foreign)
    with pytest.raises(UserError, match=r"not of mert_jax\.fit_teacher"):
        teachers.make("kmeans", checkpoint=str(foreign))
    save_file({}, foreign, {fitted_file.KEY: json.dumps(dict(teacher="kmeans", settings={}))})
    with pytest.raises(UserError, match="its settings lack 'mel_size'"):
        teachers.make("kmeans", checkpoint=str(foreign))
    foreign.write_bytes(b"RIFF is not safetensors")
    with pytest.raises(UserError, match="cannot be read as a fitted teacher"):
        teachers.make("kmeans", checkpoint=str(foreign))


def test_clusters_are_as_good_as_sklearns():
    rng = np.random.default_rng(1)
    means = rng.normal(size=(40, 6)) * 5
    x = (means[rng.integers(40, size=5000)] + rng.normal(size=(5000, 6))).astype(np.float32)
    centres = clusters.fit(x, 40, np.random.default_rng(0), 50, "test")
    error = np.square(x[:, None] - centres).sum(-1).min(1).sum()
    assert error < 1.1 * KMeans(40, n_init=3, random_state=0).fit(x).inertia_


def test_dead_centres_are_moved():
    rng = np.random.default_rng(2)
    # nearly all vectors are equal, so the first centres coincide
    x = np.zeros((4000, 2), np.float32)
    x[::100] = rng.normal(size=(40, 2))
    centres = clusters.fit(x, 30, np.random.default_rng(0), 50, "test")
    distances = np.square(x[:, None] - centres).sum(-1)
    assert len(np.unique(distances.argmin(1))) == 30


def test_fewer_distinct_vectors_than_centres():
    x = np.repeat(np.eye(3, dtype=np.float32), 50, 0)
    centres = clusters.fit(x, 8, np.random.default_rng(0), 5, "test")
    assert np.square(x[:, None] - centres).sum(-1).min(1).max() < 1e-9
