"""Probe datasets that can be made anywhere: what a model hears of music, in minutes.

    python -m mert_jax.make_tasks --output=DIR [--only=made_pitch,made_key] [--small]

Makes DIR/made_pitch, made_instrument, made_key, made_beat, made_mix, made_technique (rendered with
a soundfont; the test with another, which is never trained on) and made_drums (real one-shots; kits
left out). Each holds audio/*.flac (mono, 24 kHz), NAME.train.jsonl, NAME.val.jsonl, NAME.test.jsonl
and about.json. Two runs give the same bytes. Tasks that are there are left as they are.

What is needed: `pip install 'mert_jax[make_tasks]'` (music21's tunes, pretty_midi's font), `pip
install --no-deps tinysoundfont` (the renderer; what it would bring, pyaudio, plays sound and is not
used), and of Debian fluid-soundfont-gm and hydrogen-drumkits. What is missing is said, with the
command that brings it; tasks that do without are made, and the exit code is 1.
"""

import functools
import os
import time
from collections.abc import Callable, Sequence

from absl import flags

from mert_jax import cli, progress
from mert_jax.errors import UserError, print_error
from mert_jax.synthetic import beats, clips, drums, fonts, keys, mixes, notes, techniques
from mert_jax.synthetic.recipe import Recipe

RENDERED = {
    "made_pitch": notes.pitch,
    "made_instrument": notes.instrument,
    "made_key": keys.key,
    "made_beat": beats.beat,
    "made_mix": mixes.mix,
    "made_technique": techniques.technique,
}
TASKS = (*RENDERED, "made_drums")

FLAGS = flags.FlagValues()
_OUTPUT = flags.DEFINE_string(
    "output", None, "Directory of the tasks.", required=True, flag_values=FLAGS
)
_ONLY = flags.DEFINE_list("only", list(TASKS), "Tasks to make.", flag_values=FLAGS)
_SMALL = flags.DEFINE_bool(
    "small", False, "A handful of clips a task, to try things out.", flag_values=FLAGS
)
_TRAIN_FONT = flags.DEFINE_string(
    "train_font", "", f"Soundfont (.sf2) of train and val. [{fonts.TRAIN_FONT}]", flag_values=FLAGS
)
_TEST_FONT = flags.DEFINE_string(
    "test_font",
    "",
    "Soundfont (.sf2) of the test. [TimGM6mb, which pretty_midi brings]",
    flag_values=FLAGS,
)
_DRUMKITS = flags.DEFINE_string(
    "drumkits", "", f"Hydrogen's drum kits. [{drums.FOLDER}]", flag_values=FLAGS
)


def make_tasks(
    output: str,
    only: Sequence[str] = TASKS,
    small: bool = False,
    train_font: str = "",
    test_font: str = "",
    drumkits: str = "",
) -> dict[str, str]:
    """Make the tasks `only` in `output`, and return those that could not be made, with why.

    Raises UserError for an unknown task, for a path that was given and is wrong, and for a task in
    `output` that was made otherwise.
    """
    if unknown := sorted(set(only) - set(TASKS)):
        raise UserError(f"--only: no task {', '.join(unknown)}; there are {', '.join(TASKS)}")
    if "://" in output:
        raise UserError(f"--output={output}: tasks are made on a local disk; copy them from there")
    pair = functools.cache(lambda: fonts.pair(train_font, test_font))
    missing = {}
    for name in only:
        folder = os.path.join(output, name)
        try:
            settings = {"small": small}
            if name in RENDERED:
                settings |= {x: font.name for x, font in pair()._asdict().items()}
                make: Callable[[], Recipe] = lambda name=name: RENDERED[name](pair(), small)
            else:
                make = lambda: drums.drums(drumkits, small)
            if os.path.exists(folder):
                clips.check(folder, settings)
                print(f"{name}: there already", flush=True)
                continue
            recipe = make()
        except fonts.Missing as e:
            missing[name] = str(e)
            continue
        with progress.bar(name, len(recipe.clips), "clip") as bar:
            clips.write(folder, recipe, settings, bar.update)
        print(f"{name}: {len(recipe.clips)} clips in {folder}", flush=True)
    return missing


def report(missing: dict[str, str], asked: int) -> int:
    """Say what could not be made, one line a reason; the exit code. Raises UserError where nothing
    could be made."""
    reasons = {}
    for name, reason in missing.items():
        reasons.setdefault(reason, []).append(name)
    lines = [f"{', '.join(names)} not made: {reason}" for reason, names in reasons.items()]
    if missing and len(missing) == asked:
        raise UserError("; ".join(lines))
    for line in lines:
        print_error(line)
    return 1 if missing else 0


def main() -> int:
    """Run the command and return its exit code."""
    started = time.monotonic()
    asked = list(dict.fromkeys(_ONLY.value))
    missing = make_tasks(
        _OUTPUT.value,
        asked,
        _SMALL.value,
        _TRAIN_FONT.value,
        _TEST_FONT.value,
        _DRUMKITS.value,
    )
    code = report(missing, len(asked))
    print(f"done in {time.monotonic() - started:.0f} s")
    return code


if __name__ == "__main__":
    cli.run(main, FLAGS)
