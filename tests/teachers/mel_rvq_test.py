"""The Mel-RVQ teacher equals its definition, level by level."""

import jax
import numpy as np
import pytest

from mert_jax import teachers
from mert_jax.errors import UserError
from mert_jax.fitting import fitters
from mert_jax.models import spectrograms
from mert_jax.teachers import fitted_file, mel_rvq

SIZES = dict(books=3, size=32, dim=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    tensors = {
        "mean": rng.normal(size=128),
        "std": rng.uniform(1, 3, 128),
        "projections": np.stack([np.linalg.qr(rng.normal(size=(128, 4)))[0] for _ in range(3)]),
        "codebooks": rng.normal(0, 3, (3, 32, 4)),
    }
    tensors = {key: value.astype(np.float32) for key, value in tensors.items()}
    directory = str(tmp_path_factory.mktemp("mel_rvq"))
    fitted_file.write_fitted(directory, "mel_rvq", tensors, mel_rvq.SETTINGS | SIZES)
    return directory, tensors


def test_each_codebook_quantises_the_residual_of_those_before(checkpoint):
    directory, tensors = checkpoint
    teacher = teachers.make("mel_rvq", checkpoint=directory)
    wave = np.random.default_rng(1).normal(0, 0.1, (2, 9_700)).astype(np.float32)
    codes = np.asarray(jax.jit(teacher.apply)(teacher.params, wave))
    assert codes.dtype == np.int32
    assert codes.shape == (2, 9_700 // 320 + 1, 3)
    assert teacher.size == 32
    log_mel = np.asarray(spectrograms.log_mel(wave, teacher.params["mel_filters"], 320))
    residual = (log_mel - tensors["mean"]) / tensors["std"]
    for k in range(3):
        projected = residual @ tensors["projections"][k]
        distances = np.square(projected[..., None, :] - tensors["codebooks"][k]).sum(-1)
        np.testing.assert_array_equal(codes[..., k], distances.argmin(-1))
        rows = tensors["codebooks"][k][codes[..., k]]
        residual = residual - rows @ tensors["projections"][k].T


def test_books_selects_the_first_codebooks(checkpoint):
    directory, _ = checkpoint
    full = teachers.make("mel_rvq", checkpoint=directory)
    fewer = teachers.make("mel_rvq", checkpoint=directory, books=2)
    wave = np.random.default_rng(2).normal(0, 0.1, (1, 6_400)).astype(np.float32)
    expected = full.apply(full.params, wave)[..., :2]
    np.testing.assert_array_equal(fewer.apply(fewer.params, wave), expected)
    with pytest.raises(UserError, match=r"books=4, but .* has 3"):
        teachers.make("mel_rvq", checkpoint=directory, books=4)


def test_projections_equal_the_truncated_svd():
    x = np.random.default_rng(3).normal(size=(500, 20)) @ np.diag(np.linspace(3, 0.1, 20))
    columns = fitters.principal_columns(x.astype(np.float32), 5)
    np.testing.assert_allclose(columns.T @ columns, np.eye(5), atol=1e-5)
    projected = np.square(x @ columns).sum()
    np.testing.assert_allclose(projected, np.square(np.linalg.svd(x)[1][:5]).sum(), rtol=1e-5)
