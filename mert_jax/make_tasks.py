"""Make seven probe datasets from soundfonts, folk tunes and drum kits, in minutes.

    python -m mert_jax.make_tasks --output=DIR [--only=made_pitch,made_key] [--small]

Writes DIR/made_pitch, made_instrument, made_key, made_beat, made_mix, made_technique (rendered; the
test split with a soundfont of its own) and made_drums (recorded; the test split from kits of its
own). Each holds audio/*.flac (mono, 24 kHz), NAME.train.jsonl, NAME.val.jsonl, NAME.test.jsonl and
about.json. Two runs give the same bytes. Existing datasets are not changed.

Needs `pip install 'mert_jax[make_tasks]'` (music21's tunes, pretty_midi's soundfont), `pip install
--no-deps tinysoundfont` (the renderer; its dependency pyaudio only plays sound), and the Debian
packages fluid-soundfont-gm and hydrogen-drumkits. If one is missing, prints how to install it,
makes the other datasets and exits with 1.
"""

import os
import time
from collections.abc import Sequence

from absl import flags

from mert_jax import cli, progress
from mert_jax.errors import UserError, print_error
from mert_jax.synthetic import dataset, drums, fonts, instruments, melodies

RENDERED = {
    "made_pitch": instruments.pitch,
    "made_instrument": instruments.instrument,
    "made_key": melodies.key,
    "made_beat": melodies.beat,
    "made_mix": instruments.mix,
    "made_technique": instruments.technique,
}
TASKS = (*RENDERED, "made_drums")

FLAGS = flags.FlagValues()
define = cli.Define(FLAGS)
_OUTPUT = define.string("output", None, "Directory of the datasets.", required=True)
_ONLY = define.list("only", list(TASKS), "Datasets to make.")
_SMALL = define.bool("small", False, "Make a few clips each, for a try.")
_TRAIN_FONT = define.string("train_font", "", f"Soundfont of train and val. [{fonts.TRAIN_FONT}]")
_TEST_FONT = define.string("test_font", "", "Soundfont of the test. [pretty_midi's TimGM6mb]")
_DRUMKITS = define.string("drumkits", "", f"Folder of Hydrogen's drum kits. [{drums.FOLDER}]")


def make_tasks(
    output: str,
    only: Sequence[str] = TASKS,
    small: bool = False,
    train_font: str = "",
    test_font: str = "",
    drumkits: str = "",
) -> dict[str, str]:
    """Make the datasets `only` in `output`; return {name: reason} of those that lack a source."""
    if unknown := sorted(set(only) - set(TASKS)):
        raise UserError(f"--only: no task {', '.join(unknown)}; there are {', '.join(TASKS)}")
    if "://" in output:
        raise UserError(f"--output={output} must be on a local disk; copy the datasets from there")
    missing = {}
    for name in only:
        folder, settings = os.path.join(output, name), {"small": small}
        try:
            pair = fonts.load_fonts(train_font, test_font) if name in RENDERED else None
            if pair:
                settings |= {role: font.name for role, font in pair._asdict().items()}
            if os.path.exists(folder):
                dataset.check_settings(folder, settings)
                print(f"{name}: exists already", flush=True)
                continue
            recipe = RENDERED[name](pair, small) if pair else drums.drums(drumkits, small)
        except dataset.NotInstalled as e:
            missing[name] = str(e)
            continue
        with progress.bar(name, len(recipe.clips), "clip") as bar:
            dataset.write_dataset(folder, recipe, settings, bar.update)
        print(f"{name}: {len(recipe.clips)} clips in {folder}", flush=True)
    return missing


def report(missing: dict[str, str], asked: int) -> int:
    """Print one line for each reason why datasets are missing; return the exit code.

    Raises UserError if all that were `asked` for are missing.
    """
    lines = []
    for reason in dict.fromkeys(missing.values()):
        names = ", ".join(name for name in missing if missing[name] == reason)
        lines.append(f"{names} not made: {reason}")
    if missing and len(missing) == asked:
        raise UserError("; ".join(lines))
    for line in lines:
        print_error(line)
    return int(bool(missing))


def main() -> int:
    started, only = time.monotonic(), list(dict.fromkeys(_ONLY.value))
    options = (_SMALL.value, _TRAIN_FONT.value, _TEST_FONT.value, _DRUMKITS.value)
    code = report(make_tasks(_OUTPUT.value, only, *options), len(only))
    print(f"done in {time.monotonic() - started:.0f} s")
    return code


if __name__ == "__main__":
    cli.run(main, FLAGS)
