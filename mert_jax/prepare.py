"""Prepare audio files for training: a TFDS dataset of mono 24 kHz int16 chunks.

    python -m mert_jax.prepare --input=MUSIC --output=DIR

MUSIC is a directory, searched recursively, or audio files: wav, flac, ogg, opus, mp3, and the
formats of ffmpeg if it is installed. `tfds.builder_from_directory(DIR).as_data_source("train")`
reads DIR; DIR/report.json lists its music and every skipped file with the reason.

    python -m mert_jax.prepare --output=DIR --codes=CHECKPOINT

stores the codes that an RVQ-VAE (EnCodec, or one of `fit_teacher`) gives for whole tracks beside
the audio; `train` uses them if they exist. With --input as well, both are done.

The command may be stopped at any time and run again. A later run decodes only new files and drops
the tracks of removed ones. It needs room for about twice the dataset, 0.2 GB an hour of music.
"""

import time

from absl import flags

from mert_jax import cli, progress
from mert_jax.data.preparation.prepare_dataset import prepare, store_codes
from mert_jax.data.preparation.selection import PreparationSettings, print_summary
from mert_jax.data.preparation.workers import cpus
from mert_jax.errors import UserError

FLAGS = flags.FlagValues()
define = cli.Define(FLAGS)

_INPUT = define.multi_string(
    "input", None, "Directories and audio files; repeat the flag or separate them by commas."
)
_OUTPUT = define.string("output", None, "Directory of the dataset.")
_CHUNK_SECONDS = define.float("chunk_seconds", 30.0, "Length of a record.", 0)
_CROP_SECONDS = define.float(
    "crop_seconds", 5.12, "Longest crop of training, shared by neighbours.", 0
)
_MIN_SECONDS = define.float("min_seconds", 1.0, "Skip shorter files.", 0)
_VALIDATION_FRACTION = define.float(
    "validation_fraction", 0.05, "Fraction of tracks held out; 0: none.", 0, 0.5
)
_WORKERS = define.integer("workers", None, "Decoding processes; by default one for each CPU.", 1)
_CODES = define.string(
    "codes", None, "Checkpoint of an RVQ-VAE, to store its codes of every track."
)


def main() -> int:
    inputs = cli.paths(_INPUT.value or [])
    if not _OUTPUT.value or not (inputs or _CODES.value):
        raise UserError(
            "--input and --output are needed: --input=DIR_OR_FILES --output=DIR; or --output and "
            "--codes=CHECKPOINT, to store codes beside an existing dataset"
        )
    settings = PreparationSettings(
        chunk_seconds=_CHUNK_SECONDS.value,
        crop_seconds=_CROP_SECONDS.value,
        min_seconds=_MIN_SECONDS.value,
        validation_fraction=_VALIDATION_FRACTION.value,
    )
    chunk, crop = settings.sizes()
    if chunk <= crop or crop <= 0:
        raise UserError(
            f"--chunk_seconds={settings.chunk_seconds:g} must be longer than "
            f"--crop_seconds={settings.crop_seconds:g}, and that longer than 0"
        )
    if "://" in _OUTPUT.value:
        raise UserError(f"--output={_OUTPUT.value} is not on a local disk; copy the dataset there")
    started = time.monotonic()
    try:
        if inputs:
            report = prepare(inputs, _OUTPUT.value, settings, _WORKERS.value or cpus())
            print_summary(report, _OUTPUT.value)
        if _CODES.value:
            store_codes(_OUTPUT.value, _CODES.value)
    except KeyboardInterrupt:
        progress.note("stopped; finished files are kept: run the same command again to continue")
        return 130
    progress.note(f"done in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    cli.run(main, FLAGS)
