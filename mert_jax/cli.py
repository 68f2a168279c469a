"""The start and the end of every command: flags, one line for an error, an exit code."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from mert_jax.errors import USER_ERROR, UserError, print_error


class Define:
    """absl's DEFINE functions for the flags of one command: `define.string("output", ...)`."""

    def __init__(self, values: flags.FlagValues):
        self._values = values

    def __getattr__(self, kind: str) -> Callable[..., flags.FlagHolder]:
        module = config_flags if kind == "config_file" else flags
        return functools.partial(getattr(module, f"DEFINE_{kind}"), flag_values=self._values)


def fail(message: object, code: int = USER_ERROR) -> None:
    """Print one line on standard error and exit."""
    print_error(message)
    sys.exit(code)


def paths(values: Sequence[str]) -> list[str]:
    """Return the paths of a repeated flag, splitting at commas each value that is not a path."""
    parts = [[value] if os.path.exists(value) else value.split(",") for value in values]
    return [part for value in parts for part in value if part]


def config_of(flag: flags.FlagHolder) -> Any:
    """Return the config that a flag names, None if not given. Raises UserError if it is missing."""
    try:
        if flag.value is not None:
            flag.value.keys()
    except OSError as e:  # config_flags reports a missing file only when a value is read
        raise UserError(str(e)) from e
    return flag.value


def run(main: Callable[[], int | None], command_flags: flags.FlagValues = flags.FLAGS) -> None:
    """Parse all flags, call `main`, and exit with its code or, after one line, a UserError's."""

    def guarded(argv: list[str]) -> int | None:
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}; options are written --name=value (see --help)")
        if not flags.FLAGS["verbosity"].present:  # libraries log a lot at INFO
            logging.set_verbosity(logging.WARNING)
        try:
            return main()
        except UserError as e:
            return fail(e, e.code)

    app.run(guarded, flags_parser=lambda argv: _parse(argv, command_flags))


def _parse(argv: Sequence[str], command_flags: flags.FlagValues) -> list[str]:
    # each command has flags of its own, so that all commands can be imported side by side
    if command_flags is not flags.FLAGS:
        own = {name: command_flags[name] for name in command_flags}
        command_flags.append_flag_values(flags.FLAGS)
        for name, flag in own.items():  # for --help
            flags.FLAGS[name] = flag
            flags.FLAGS.register_flag_by_module(argv[0], flag)
    try:
        rest = command_flags(argv)
        flags.FLAGS.mark_as_parsed()
        return rest
    except (AttributeError, KeyError) as e:  # what config_flags raises for an unknown key
        key = str(e).strip("\"'")
        return fail(f"unknown config key {key!r}; the config file lists its keys, --help the flags")
    except (flags.Error, TypeError, ValueError, OSError) as e:
        # a mistake inside a config file comes with its traceback: keep the flag and the last line
        flag, traceback, _ = str(e).partition(": Error whilst parsing config file")
        message = f"{flag}: {str(e).splitlines()[-1]}" if traceback else flag
        return fail(f"{message} (see --help)")
