"""Run a command: `python -m mert_jax COMMAND [--flags]`; without one, list them."""

import importlib
import sys

from mert_jax import cli

# the first line of each module's docstring is its description
COMMANDS = (
    *("prepare", "fit_teacher", "train", "report", "convert", "extract", "make_tasks", "probe"),
    "plan",
)


def main() -> None:
    """Run the command that the first argument names, or list all commands."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        print("python -m mert_jax COMMAND [--flags]; COMMAND --help lists the flags\n")
        for command in COMMANDS:
            summary = importlib.import_module(f"mert_jax.{command}").__doc__.splitlines()[0]
            print(f"  {command:<12} {summary}")
        return
    if name not in COMMANDS:
        cli.fail(f"unknown command {name!r}; there are {', '.join(COMMANDS)}")
    module = importlib.import_module(f"mert_jax.{name}")
    sys.argv[:2] = [f"mert_jax {name}"]
    sys.modules["__main__"].__doc__ = module.__doc__  # what absl's --help prints
    cli.run(module.main, module.FLAGS)


if __name__ == "__main__":
    main()
