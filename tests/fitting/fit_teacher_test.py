"""Fitting on a small prepared dataset: deterministic, readable by `make`, with clear errors."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import soundfile

from mert_jax import teachers
from mert_jax.data import records
from mert_jax.errors import UserError
from mert_jax.fitting import fitters
from mert_jax.fitting.sampling import Sampler
from mert_jax.models import spectrograms
from mert_jax.teachers import fitted_file
from tests.runs import slow

QUICKLY = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
ENVIRONMENT = QUICKLY | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # k-means runs for longer


def command(module: str, *flags: str) -> list[str]:
    return [sys.executable, "-m", f"mert_jax.{module}", *flags]


def start(*flags: str, env: dict[str, str] = ENVIRONMENT) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command("fit_teacher", *flags), env=env, **pipes)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    """Four prepared tracks of plucked partials, 48 s, one of them for validation."""
    folder = tmp_path_factory.mktemp("music")
    rng = np.random.default_rng(0)
    for track, seconds in enumerate((14, 12, 12, 10)):
        t = np.arange(seconds * 24_000) / 24_000
        notes = rng.uniform(80, 900, (seconds * 2, 5)).repeat(12_000, 0).T
        pluck = np.exp(-2 * (t % 0.5))
        wave = 0.1 * np.sin(2 * np.pi * notes * t).sum(0) * pluck + 0.003 * rng.normal(size=t.size)
        soundfile.write(folder / f"{track}.wav", wave, 24_000)
    output = str(tmp_path_factory.mktemp("prepared") / "data")
    flags = [f"--input={folder}", f"--output={output}", "--crop_seconds=2"]
    done = subprocess.run(
        command("prepare", *flags, "--validation_fraction=0.25"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def clip(dataset) -> np.ndarray:
    """Two seconds of the held-out track."""
    samples = records.open_source(dataset, "validation")[0]["audio"]
    return samples[None, 24_000:72_000].astype(np.float32) / 32768


def test_equal_seeds_give_equal_files_in_other_processes(dataset, tmp_path, clip):
    flags = ["--teacher=kmeans", f"--data={dataset}", "--frames=1500", "--iterations=3"]
    outputs = [tmp_path / name for name in ("one", "two")]
    running = [start(*flags, f"--output={output}", "--seed=7") for output in outputs]
    printed = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], printed
    one, two = ((output / fitted_file.FILE).read_bytes() for output in outputs)
    assert one == two
    out, error = printed[0]
    assert "warning: 1500 frames are few for a codebook of 300" in error
    assert "3000 (0.7 minutes of music, --frames=3000) are enough" in error
    books = [["log_mel", "300"], ["chroma", "200"]]
    expected = [[split, *book] for split in ("train", "validation") for book in books]
    assert [line.split()[:3] for line in out.splitlines()] == expected
    report = json.loads((outputs[0] / "report.json").read_text())
    for split, frames in (("train", 1500), ("validation", 375)):
        assert report["frames"][split] == frames
        for book in report["figures"][split]:
            assert sum(book["counts"]) == frames
            assert 1 < book["perplexity"] <= book["size"] - book["dead"]
            assert 0 < book["error"] < 1
    teacher = teachers.make("kmeans", checkpoint=str(outputs[0]))
    codes = np.asarray(jax.jit(teacher.apply)(teacher.params, clip))
    assert codes.shape == (1, 151, 2)
    assert len(np.unique(codes[..., 0])) > 5
    assert codes[..., 1].max() < 200


def test_each_level_of_mel_rvq_lowers_the_error(dataset, tmp_path, clip):
    sampler, sizes = Sampler(dataset, seed=0, frames=1200), dict(books=3, size=32, dim=4)
    contents = []
    for _ in range(2):
        report = fitters.fit("mel_rvq", sampler, str(tmp_path), 5, **sizes)
        contents.append((tmp_path / fitted_file.FILE).read_bytes())
    assert contents[0] == contents[1]
    for split in ("train", "validation"):
        errors = [1, *(book["error"] for book in report["figures"][split])]
        assert errors == sorted(errors, reverse=True)
    teacher = teachers.make("mel_rvq", checkpoint=str(tmp_path))
    codes = np.asarray(jax.jit(teacher.apply)(teacher.params, clip))
    assert codes.shape == (1, 151, 3)
    assert len(np.unique(codes)) > 5


def test_random_projection_gets_the_datasets_mean_and_std(dataset, tmp_path, clip):
    sampler = Sampler(dataset, seed=0, frames=1200)
    fitters.fit("random_projection", sampler, str(tmp_path), iterations=1)
    options = dict(books=2, size=64)
    plain = teachers.make("random_projection", **options)
    teacher = teachers.make("random_projection", checkpoint=str(tmp_path), **options)
    codes = np.asarray(jax.jit(teacher.apply)(teacher.params, clip))
    assert codes.shape == (1, 151, 2)

    def mel(wave: np.ndarray) -> jax.Array:
        return spectrograms.log_mel(wave, teacher.params["mel_filters"], 320)

    frames = sampler.draw("train", mel)
    np.testing.assert_allclose(teacher.params["mean"], frames.mean(0), rtol=1e-4)
    normalised = (np.asarray(mel(clip))[0] - frames.mean(0)) / frames.std(0)
    for book in range(2):
        vectors = normalised @ teacher.params["projections"][book]
        expected = (vectors @ teacher.params["codebooks"][book].T).argmax(1)
        assert (codes[0, :, book] == expected).mean() > 0.98
    assert (codes != plain.apply(plain.params, clip)).mean() > 0.3
    with pytest.raises(UserError, match="fitted with n_fft=2048, and the teacher has n_fft=1024"):
        teachers.make("random_projection", checkpoint=str(tmp_path), n_fft=1024)
    # a file of another teacher is not replaced
    with pytest.raises(UserError, match="holds teacher 'random_projection'"):
        fitters.fit("kmeans", sampler, str(tmp_path), iterations=1)


def test_unwritable_outputs_are_refused_before_fitting(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    sampler = Sampler(dataset, seed=0, frames=200)
    for output, words in (
        (str(tmp_path / "file" / "x"), "is not a writable directory"),
        ("gs://bucket/x", "a directory of a local disk"),
    ):
        with pytest.raises(UserError, match=words):
            fitters.fit("kmeans", sampler, output, iterations=1)


def test_too_little_music_is_refused(dataset, tmp_path):
    sampler = Sampler(dataset, seed=0, frames=200)
    with pytest.raises(UserError, match=r"200 frames of .* cannot make a codebook of 300"):
        fitters.fit("kmeans", sampler, str(tmp_path), iterations=1)


def test_errors_are_one_line_and_ctrl_c_leaves_nothing(dataset, tmp_path):
    mistakes = {
        "cannot be fitted; choose one of kmeans": ["--teacher=nope", f"--data={dataset}"],
        "no prepared dataset in": ["--teacher=kmeans", f"--data={tmp_path}"],
        "--teacher, --data and --output are needed": ["--teacher=kmeans"],
    }
    flags = ["--teacher=mel_rvq", f"--data={dataset}", f"--output={tmp_path / 'y'}"]
    interrupted = start(*flags, "--iterations=100000")
    deadline, printed = time.monotonic() + 120, ""
    while "level 0" not in printed:
        assert time.monotonic() < deadline, printed
        printed += interrupted.stderr.read(1)
    interrupted.send_signal(signal.SIGINT)
    _, error = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130
    assert "stopped; nothing was written" in error
    assert "Traceback" not in error
    assert not (tmp_path / "y").exists()
    running = [start(*flags, f"--output={tmp_path / 'x'}") for flags in mistakes.values()]
    for words, process in zip(mistakes, running, strict=True):
        _, error = process.communicate(timeout=120)
        assert process.returncode == 2, error
        assert error.startswith("error: ")
        assert words in error
        assert error.count("\n") == 1


SMALL = "filters=2 dim=8 books=2 size=32 batch_size=4 num_samples=6400"
STEPS = "total_steps=6 log_every=2 eval_every=4"
CODEC = ["--teacher=rvq_vae", "--config=configs/codec.py"]
CODEC += [f"--config.{setting}" for setting in f"{SMALL} {STEPS}".split()]


@pytest.fixture(scope="module")
def codec(dataset, tmp_path_factory) -> tuple[str, str]:
    """The output of a codec of six updates, and what its training printed."""
    output = str(tmp_path_factory.mktemp("codec"))
    return output, train_codec(dataset, output, 6)


def train_codec(dataset: str, output: str, steps: int) -> str:
    flags = [*CODEC, f"--data={dataset}", f"--output={output}", f"--config.total_steps={steps}"]
    process = start(*flags, env=QUICKLY)
    printed = process.communicate()
    assert process.returncode == 0, printed
    return printed[0]


def logged_steps(output: str) -> list[int]:
    with open(os.path.join(output, "training", "metrics.jsonl")) as f:
        return [json.loads(line)["step"] for line in f]


@pytest.mark.slow
def test_a_codec_resumes(dataset, tmp_path):
    train_codec(dataset, str(tmp_path), 3)
    assert "at step 3 of 6" in train_codec(dataset, str(tmp_path), 6)
    assert logged_steps(str(tmp_path)) == [2, 3, 4, 6]


def test_a_codec_reports_its_quality(codec):
    output, printed = codec
    assert logged_steps(output) == [2, 4, 6]
    with open(os.path.join(output, "report.json")) as f:
        report = json.load(f)
    assert report["steps"] == 6
    assert set(report["codebooks"]) == {"trained", "untrained", "none"}
    for kind, figures in report["codebooks"].items():
        assert np.isfinite([figures["mel_distance"], figures["si_sdr"]]).all()
        assert f"{kind}: log-mel distance {figures['mel_distance']:.3f}" in printed
    files = os.listdir(os.path.join(output, "listen"))
    assert {"0_original.wav", "0_trained.wav"} <= set(files)
    wave, rate = soundfile.read(os.path.join(output, "listen", "0_trained.wav"))
    assert (len(wave), rate) == (48_000, 24_000)


def test_a_fitted_codec_is_a_teacher(codec, clip):
    teacher = teachers.make("rvq_vae", checkpoint=codec[0])
    codes = jax.jit(teacher.apply)(teacher.params, clip)
    assert codes.shape == (1, 150, 2)
    assert teacher.size == 32
    assert codes.max() < 32


def test_the_output_of_another_codec_is_refused(dataset, codec):
    process = start(*CODEC, f"--data={dataset}", f"--output={codec[0]}", "--config.filters=4")
    error = process.communicate()[1]
    assert process.returncode == 2
    assert "filters: 2 there, 4 now" in error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--teacher=rvq_vae", "--frames=10"], "--frames has no effect with --teacher=rvq_vae"),
        (
            ["--teacher=kmeans", "--config=configs/codec.py"],
            "--config has no effect with --teacher=kmeans",
        ),
        ([*CODEC, "--config.num_samples=5000"], "num_samples=5000"),
        *slow(
            ([*CODEC, "--config.num_samples=64000"], "from 4160 to 48000"),
            ([*CODEC, "--config.books=0"], "books=0"),
            ([*CODEC, "--config.nothing=0"], "nothing"),
        ),
    ],
)
def test_wrong_settings_of_a_codec_are_refused(dataset, tmp_path, flags, words):
    process = start(*flags, f"--data={dataset}", f"--output={tmp_path / 'out'}")
    error = process.communicate()[1]
    assert process.returncode == 2
    assert words in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()
