"""All commands can be imported in one process, since each has its own flags."""

import importlib
import subprocess
import sys

import pytest

from mert_jax import __main__ as commands


def test_commands_are_imported_side_by_side():
    # absl refuses a flag that two modules define in one registry
    modules = [importlib.import_module(f"mert_jax.{name}") for name in commands.COMMANDS]
    assert all(callable(module.main) for module in modules)


@pytest.mark.parametrize("flags", [(), ("--help",)])
def test_the_package_lists_its_commands(flags):
    done = subprocess.run(
        [sys.executable, "-m", "mert_jax", *flags], capture_output=True, text=True, check=True
    )
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")}
    assert listed == set(commands.COMMANDS)


def test_an_unknown_command_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "mert_jax", "trian"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "unknown command 'trian'" in done.stderr
