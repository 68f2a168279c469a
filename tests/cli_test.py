"""Commands end in one line and exit code 2 for the caller's mistakes, in a traceback for bugs."""

import os
import subprocess
import sys

import pytest

COMMAND = """
from absl import flags
from mert_jax import cli
from mert_jax.errors import UserError

KIND = flags.DEFINE_string("kind", "fine", "What main does.")

def main():
    print("main ran")
    if KIND.value == "user":
        raise UserError("batch_size 7\\n  is odd")
    if KIND.value == "bug":
        raise ValueError("not the caller's fault")
    return {"fine": None, "stopped": 143}[KIND.value]

cli.run(main)
"""


def call(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *args], capture_output=True, text=True, env=os.environ
    )


@pytest.mark.parametrize(
    ("arg", "words"),
    [("--knd=x", "knd"), ("fine", "'fine'"), ("--kind=user", "error: batch_size 7 is odd")],
    ids=["unknown flag", "positional argument", "UserError"],
)
def test_a_mistake_of_the_caller_ends_in_one_line(arg, words):
    done = call(arg)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert ("main ran" in done.stdout) == (arg == "--kind=user")


def test_a_bug_keeps_its_traceback():
    done = call("--kind=bug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ValueError: not the caller's fault" in done.stderr


@pytest.mark.parametrize(("kind", "code"), [("fine", 0), ("stopped", 143)])
def test_the_exit_code_is_what_main_returns(kind, code):
    done = call(f"--kind={kind}")
    assert (done.returncode, done.stderr) == (code, "")
