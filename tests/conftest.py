"""Shared fixtures; every test has eight fake CPU devices and strict rank promotion."""

import atexit
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# All processes of a session share compiled programs: pytest's workers and the commands they run
# inherit the variable.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mert_jax_programs_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Small programs compile for longer than they run; peers_test.py runs what the optimiser makes.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax
import numpy as np
import pytest
import soundfile

from mert_jax.constants import SAMPLE_RATE
from tests import runs

jax.config.update("jax_numpy_rank_promotion", "raise")

collect_ignore = ["golden_test.py"]  # unless named on the command line: see its docstring


@pytest.fixture(scope="session", autouse=True)
def _eight_devices():
    assert jax.device_count() == 8, "8 fake CPU devices are needed: jax was set up earlier"


@pytest.fixture(scope="session")
def music(tmp_path_factory):
    """A folder of four tracks of plucked partials, one shorter than a clip."""
    folder = tmp_path_factory.mktemp("music")
    rng = np.random.default_rng(0)
    for track, seconds in enumerate((9, 8, 7, 1.1)):
        t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
        pluck, partials = np.exp(-2 * (t % 0.5)), rng.uniform(80, 900, 5)
        tones = [np.sin(2 * np.pi * f * t) * pluck for f in partials]
        wave = 0.1 * np.sum(tones, 0) + 0.003 * rng.normal(size=t.size)
        soundfile.write(folder / f"{track}.wav", wave, SAMPLE_RATE)
    return folder


@pytest.fixture(scope="session")
def dataset(music, tmp_path_factory):
    """The tracks of `music`, prepared as clips of two seconds."""
    output = tmp_path_factory.mktemp("prepared") / "data"
    done = runs.run("prepare", f"--input={music}", f"--output={output}", "--crop_seconds=2")
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="session")
def finished(dataset, tmp_path_factory):
    """The workdir of a finished run of six steps, and its output. Tests must not change it."""
    workdir = tmp_path_factory.mktemp("run") / "workdir"
    done = runs.run("train", *runs.flags(dataset, workdir))
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout
