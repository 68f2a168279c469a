"""Commands run as subprocesses, with the flags of a small training run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import small

CLOCK = ("audio_seconds_per_second", "mfu")  # the metrics that depend on the clock
# two devices compile faster than eight
ENVIRONMENT = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}


def slow(*cases) -> list:
    """Mark the cases of a parametrised test as slow."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def command(module: str, *flags: str) -> list[str]:
    """The command line of `python -m mert_jax.MODULE`."""
    return [sys.executable, "-m", f"mert_jax.{module}", *flags]


def run(module: str, *flags: str) -> subprocess.CompletedProcess:
    """Run a command on two devices and wait for its end."""
    return subprocess.run(
        command(module, *flags), capture_output=True, text=True, timeout=300, env=ENVIRONMENT
    )


def flags(dataset, workdir, *extra: str) -> list[str]:
    """Return the flags of `train` for six steps of the small student; `extra` flags override."""
    return [
        *("--config=configs/tiny.py", f"--workdir={workdir}", f"--config.data.dir={dataset}"),
        *(*small.command_line(), *extra),
    ]


def read_jsonl(path: Path) -> list[dict]:
    """Return all rows of a JSONL file."""
    with open(path) as file:
        return [json.loads(line) for line in file]


def rows(workdir: Path) -> list[dict]:
    """Return the logged metrics that do not depend on the clock."""
    logged = read_jsonl(workdir / "metrics.jsonl")
    return [{key: x for key, x in row.items() if key not in CLOCK} for row in logged]
