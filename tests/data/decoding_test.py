"""Decoding: every format, rate and channel count becomes the same mono 24 kHz wave."""

import shutil

import numpy as np
import pytest
import soundfile

from mert_jax.data import decoding
from mert_jax.data.decoding import SkippedFile

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_24"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_16"),
}


def tone(seconds, sample_rate, channels=1, frequency=440.0):
    """A quiet sine f64 [n, channels], the same in every channel."""
    t = np.arange(round(seconds * sample_rate)) / sample_rate
    return np.repeat(0.3 * np.sin(2 * np.pi * frequency * t)[:, None], channels, axis=1)


def decoded(path):
    with decoding.decode(str(path)) as (header, blocks):
        return header, np.concatenate(list(blocks))


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_format_gives_the_tone_at_24_khz(tmp_path, suffix, channels):
    container, subtype = FORMATS[suffix]
    sample_rate = 48_000 if suffix == "opus" else 44_100
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(
        path, tone(3, sample_rate, channels), sample_rate, format=container, subtype=subtype
    )
    header, wave = decoded(path)
    assert header == (sample_rate, channels, f"{container}/{subtype}", header.frames)
    assert abs(len(wave) - 3 * 24_000) <= 0.1 * 24_000  # mp3 and opus pad
    # phase is free in lossy formats: compare level and frequency away from the edges
    middle = wave[24_000:48_000]
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.02)
    assert np.argmax(np.abs(np.fft.rfft(middle))) == 440


@pytest.mark.parametrize("sample_rate", [8_000, 11_025, 22_050, 32_000, 48_000, 96_000])
def test_every_rate_gives_the_same_wave(tmp_path, sample_rate):
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(2, sample_rate), sample_rate, subtype="FLOAT")
    _, wave = decoded(path)
    assert abs(len(wave) - 48_000) <= 1
    inner = slice(2_000, 46_000)  # a resampler rings at the edges
    np.testing.assert_allclose(wave[inner], tone(2, 24_000)[inner, 0], atol=1e-3)


def test_channels_are_averaged(tmp_path):
    path = tmp_path / "surround.wav"
    rng = np.random.default_rng(0)
    samples = rng.integers(-8_000, 8_000, (24_000, 6), dtype=np.int16)
    soundfile.write(path, samples, 24_000)
    _, wave = decoded(path)
    np.testing.assert_allclose(wave, samples.mean(axis=1) / 32_768, atol=1e-6)


def test_16_bit_at_24_khz_is_bit_exact(tmp_path):
    path = tmp_path / "all.wav"
    samples = np.arange(-32_768, 32_768).astype(np.int16)
    soundfile.write(path, samples, 24_000)
    audio, clipped = decoding.to_int16(decoded(path)[1])
    np.testing.assert_array_equal(audio, samples)
    assert clipped == 0


def test_to_int16_rounds_and_counts_what_clips():
    wave = np.array([0.6, -0.6, 32_767.4, 32_768, -32_768, -32_769]) / 32_768
    audio, clipped = decoding.to_int16(wave.astype(np.float32))
    np.testing.assert_array_equal(audio, [1, -1, 32_767, 32_767, -32_768, -32_768])
    assert audio.dtype == np.dtype("<i2")
    assert clipped == 2


def test_blocks_are_one_signal(tmp_path, monkeypatch):
    path = tmp_path / "noise.wav"
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (100_000, 2))
    soundfile.write(path, samples, 44_100)
    _, one_block = decoded(path)
    monkeypatch.setattr(decoding, "_BLOCK_SAMPLES", 3_000)
    _, small_blocks = decoded(path)
    np.testing.assert_allclose(small_blocks, one_block, atol=1e-6)


def skip_reason(path):
    with pytest.raises(SkippedFile) as caught:
        decoded(path)
    return caught.value.reason


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_cut_off_is_truncated(tmp_path, suffix):
    container, subtype = FORMATS[suffix]
    sample_rate = 48_000 if suffix == "opus" else 44_100
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, (sample_rate * 5, 2))
    path = tmp_path / f"cut.{suffix}"
    soundfile.write(path, noise, sample_rate, format=container, subtype=subtype)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    assert skip_reason(path) == "truncated"


def test_a_decoder_error_in_the_middle_is_truncated(tmp_path):
    path = tmp_path / "damaged.flac"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.3, 0.3, 240_000), 24_000)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 5_000] = bytes(range(250)) * 20
    path.write_bytes(data)
    assert skip_reason(path) == "truncated"


def test_a_wav_written_to_a_pipe_is_not_truncated(tmp_path):
    path = tmp_path / "pipe.wav"
    soundfile.write(path, tone(1, 24_000), 24_000)
    data = bytearray(path.read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    assert len(decoded(path)[1]) == 24_000


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_skipped(tmp_path, bad):
    path = tmp_path / "bad.wav"
    wave = tone(1, 24_000, channels=2)
    wave[12_345, 1] = bad
    soundfile.write(path, wave, 24_000, subtype="FLOAT")
    assert skip_reason(path) == "NaN or Inf"


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "opus", "mp3"])
def test_other_files_are_not_audio(tmp_path, suffix):
    path = tmp_path / f"text.{suffix}"
    path.write_text("not a sound\n" * 500)
    assert skip_reason(path) == "not audio"


def test_empty_and_missing_files(tmp_path):
    (tmp_path / "empty.mp3").touch()
    assert skip_reason(tmp_path / "empty.mp3") == "empty"
    soundfile.write(tmp_path / "header.wav", np.zeros(0), 24_000)
    assert skip_reason(tmp_path / "header.wav") == "empty"
    assert skip_reason(tmp_path / "gone.wav") == "unreadable"


def test_a_name_that_is_not_utf8(tmp_path):
    path = bytes(tmp_path) + b"/\xff.wav"
    with open(path, "wb") as file:
        soundfile.write(file, tone(1, 24_000), 24_000, format="WAV")
    assert len(decoded(path.decode("utf-8", "surrogateescape"))[1]) == 24_000


# A stand-in for ffmpeg: writes the au stream that ours is told to write, or fails as ffmpeg does.
_FAKE_FFMPEG = """#!{python}
import struct, sys
import numpy as np
mode = open(sys.argv[sys.argv.index("-i") + 1].removeprefix("file:")).read()
if mode == "bad":
    sys.exit("Invalid data found when processing input")
wave = np.repeat(np.arange(30_000)[:, None] / 60_000, 2, axis=1).astype(">f4")
sys.stdout.buffer.write(struct.pack(">4s5I", b".snd", 28, 0xFFFFFFFF, 6, 24_000, 2) + b"note")
sys.stdout.buffer.write(wave.tobytes())
if mode == "cut":
    sys.stdout.flush()
    sys.exit("corrupt input packet")
"""


@pytest.fixture
def fake_ffmpeg(tmp_path, monkeypatch):
    import sys

    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ffmpeg").write_text(_FAKE_FFMPEG.format(python=sys.executable))
    (folder / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.usefixtures("fake_ffmpeg")
def test_ffmpeg_decodes_what_libsndfile_does_not(tmp_path):
    path = tmp_path / "song.m4a"
    path.write_text("good")
    header, wave = decoded(path)
    assert header == (24_000, 2, "ffmpeg", None)
    np.testing.assert_allclose(wave, np.arange(30_000) / 60_000, atol=1e-7)
    path.write_text("cut")
    assert skip_reason(path) == "truncated"
    path.write_text("bad")
    assert skip_reason(path) == "not audio"


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
def test_the_real_ffmpeg(tmp_path):
    import subprocess

    soundfile.write(tmp_path / "a.wav", tone(2, 44_100, 2), 44_100)
    path = tmp_path / "a.m4a"
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", "-b:a", "192k", path]
    subprocess.run(command, check=True)
    header, wave = decoded(path)
    assert header[:3] == (44_100, 2, "ffmpeg")
    assert np.sqrt(np.mean(wave[12_000:36_000] ** 2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.02)


def test_without_ffmpeg_the_reason_names_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    (tmp_path / "song.m4a").write_bytes(b"\0\0\0 ftypM4A " * 100)
    assert skip_reason(tmp_path / "song.m4a") == "needs ffmpeg"
