"""The CQT against nnAudio and librosa."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax import teachers
from mert_jax.teachers import cqt
from tests import cqt_definition
from tests.golden_files import (
    check,
    five_seconds,
    keys,
    max_error,
    names,
    npz,
    read_json,
    relative_l2,
)

CQT_ARRAYS = r"cqt(\d+)(_sum_over_frames|_sumsq_over_bins)?"


def cqt_wave(clip: str) -> np.ndarray:
    """The clip's samples; mixtures are the first ones of the 5 s of music."""
    stored = npz("cqt.npz")
    if f"{clip}/audio_i16" in stored:
        audio = stored[f"{clip}/audio_i16"]
    else:
        audio = five_seconds()[0, : int(clip.rpartition("_")[2])]
    return audio[None].astype(np.float32) / 32768


@functools.cache
def our_cqt(clip: str, bins: int) -> np.ndarray:
    """[F, T], bins first as nnAudio has them."""
    teacher = teachers.make("cqt", n_bins=bins, bins_per_octave=bins // 7)
    return np.asarray(jax.jit(teacher.apply)(teacher.params, cqt_wave(clip)))[0].T


def stored_bins_and_frames(clip: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    stored = npz("cqt.npz")
    frames = stored.get(f"{clip}/frames")
    bins = stored.get(f"{clip}/bins")
    if kind == "cqt84":
        return np.arange(84), frames[::2]
    return (bins[::4] if kind == "librosa336" else bins), frames


@pytest.mark.parametrize(
    ("clip", "key"),
    [key.rsplit("/", 1) for key in keys("cqt.npz") if re.search(rf"/{CQT_ARRAYS}$", key)],
)
def test_cqt(clip, key, record_property):
    stored = npz("cqt.npz")[f"{clip}/{key}"]
    bins, over = re.fullmatch(CQT_ARRAYS, key).groups()
    ours = our_cqt(clip, int(bins)).astype(np.float64)
    if over == "_sum_over_frames":
        ours = ours.sum(1)
    elif over == "_sumsq_over_bins":
        ours = np.square(ours).sum(0)
    else:
        rows, frames = stored_bins_and_frames(clip, key)
        ours = ours[np.ix_(rows, frames)]
    check(record_property, max_error(ours, stored), 1e-4 * np.abs(stored).max())
    check(record_property, relative_l2(ours, stored), 1e-4)


@pytest.mark.parametrize("clip", [k[:-11] for k in keys("cqt.npz") if k.endswith("/librosa336")])
def test_cqt_tells_librosa_apart(clip):
    """A CQT by recursive downsampling is outside the tolerance, of nnAudio's and of ours."""
    rows, frames = stored_bins_and_frames(clip, "librosa336")
    librosa = npz("cqt.npz")[f"{clip}/librosa336"]
    ours = our_cqt(clip, 336)[np.ix_(rows, frames)]
    assert relative_l2(librosa, ours) > 1e-3


@pytest.mark.parametrize("key", keys("cqt_kernels.npz"))
def test_cqt_kernels(key):
    stored, (kind, *bin_, what) = npz("cqt_kernels.npz")[key], key.split("/")
    bins = int(kind[1:])
    made, lengths, frequencies = cqt_definition.kernels(bins, bins // 7)
    if what == "lengths":
        np.testing.assert_array_equal(lengths, stored)
        ours, _ = cqt.lengths_and_frequencies(24000, 32.7, bins, bins // 7)
        np.testing.assert_array_equal(ours, stored)
        return
    if what == "freqs":
        np.testing.assert_allclose(frequencies, stored, rtol=1e-12)
        _, ours = cqt.lengths_and_frequencies(24000, 32.7, bins, bins // 7)
        np.testing.assert_allclose(ours, stored, rtol=1e-12)
        return
    kernel = made[int(bin_[0])]
    nonzero = np.flatnonzero(kernel)
    if what == "first_last_nonzero":
        width = 2 ** math.ceil(math.log2(lengths[0]))
        first = width // 2 - (len(kernel) + 1) // 2
        np.testing.assert_array_equal(first + nonzero[[0, -1]], stored)
    else:
        part = getattr(kernel, what)[nonzero[0] :][: len(stored)]
        assert max_error(part, stored) <= 1e-7 * np.abs(kernel).max()


@pytest.mark.skipif(not names("cqt_info.json"), reason="the folder has no cqt_info.json")
def test_cqt_info():
    info = read_json("cqt_info.json")
    teacher = teachers.make("cqt")
    for samples, frames in info.get("frames_per_length", {}).items():
        wave = jax.ShapeDtypeStruct((1, int(samples)), jnp.float32)
        assert jax.eval_shape(teacher.apply, teacher.params, wave).shape == (1, frames, 336)
    for bins in (336, 84):
        lengths, frequencies = cqt.lengths_and_frequencies(24000, 32.7, bins, bins // 7)
        if f"lengths{bins}_first_last" in info:
            assert lengths[[0, -1]].tolist() == info[f"lengths{bins}_first_last"]
        if f"top_freq_{bins}" in info:
            np.testing.assert_allclose(frequencies[-1], info[f"top_freq_{bins}"], rtol=1e-12)
        if f"kernel_width_{bins}" in info:
            assert 2 ** math.ceil(math.log2(lengths[0])) == info[f"kernel_width_{bins}"]


@pytest.mark.parametrize(
    "clip",
    [
        clip
        for clip in read_json("cqt_summary.json")
        if f"{clip}/audio_i16" in npz("cqt.npz") or names("audio_5s.npz")
    ],
)
def test_cqt_summary(clip):
    stored, ours = read_json("cqt_summary.json")[clip], our_cqt(clip, 336).astype(np.float64)
    if "frames" in stored:
        assert ours.shape[1] == stored["frames"]
    values = dict(max=ours.max(), mean=ours.mean(), rms=np.square(ours).mean() ** 0.5)
    for key in set(values) & set(stored):
        np.testing.assert_allclose(values[key], stored[key], rtol=1e-4)
