"""Fit a teacher to a prepared dataset: one file that `teachers.make` reads.

    python -m mert_jax.fit_teacher --teacher=kmeans --data=DATA --output=DIR

DATA is the output of `mert_jax.prepare`. DIR gets teacher.safetensors (for
`teachers.make("kmeans", checkpoint=DIR)` and `--config.teacher.kmeans.checkpoint=DIR`), and
report.json: how many codes are in use, and how much of the frames' variance the codebooks leave, on
the train split and on held-out tracks. The same seed, data and sizes give the same bytes.

    python -m mert_jax.fit_teacher --teacher=rvq_vae --config=configs/codec.py \
        --data=DATA --output=DIR

trains a codec instead (full size without --config) and resumes when run again. DIR gets the codec
in EnCodec's format, for `make` and `transformers.EncodecModel.from_pretrained`, and in DIR/listen a
few held-out clips before and after.
"""

import os

from absl import flags

from mert_jax import cli, progress
from mert_jax.errors import UserError
from mert_jax.fitting import codec_run, fitters
from mert_jax.fitting.fitters import FITTERS
from mert_jax.fitting.sampling import Sampler
from mert_jax.teachers import fitted_file

FLAGS = flags.FlagValues()
define = cli.Define(FLAGS)
CODEC = "rvq_vae"  # trained by gradient descent; the others are clusters or statistics
TEACHERS = (*FITTERS, CODEC)

_TEACHER = define.string("teacher", None, f"The teacher to fit: {', '.join(TEACHERS)}.")
_DATA = define.string("data", None, "Directory of a prepared dataset.")
_OUTPUT = define.string("output", None, "Directory of the fitted teacher.")
_SEED = define.integer("seed", 0, "Seed of the frames drawn and of the first centres.", 0)
_FRAMES = define.integer(
    "frames", 100_000, "Most frames to draw (75 a second); more take more memory and time.", 1
)
_ITERATIONS = define.integer("iterations", 50, "Most k-means steps for each codebook.", 1)
_CONFIG = define.config_file("config", None, "Settings of rvq_vae, such as configs/codec.py.")


def _check_flags() -> None:
    """Raise UserError for a flag that is missing, wrong or without effect."""
    names = ", ".join(TEACHERS)
    if not (_TEACHER.value and _DATA.value and _OUTPUT.value):
        raise UserError(
            f"--teacher, --data and --output are needed: --teacher=NAME (one of {names}) "
            "--data=PREPARED_DIR --output=DIR"
        )
    if _TEACHER.value not in TEACHERS:
        raise UserError(f"--teacher={_TEACHER.value} cannot be fitted; choose one of {names}")
    unused = ("frames", "iterations") if _TEACHER.value == CODEC else ("config",)
    if given := [f"--{name}" for name in unused if FLAGS[name].present]:
        raise UserError(
            f"{' and '.join(given)} has no effect with --teacher={_TEACHER.value}; leave it out"
        )


def main() -> int:
    _check_flags()
    if _TEACHER.value == CODEC:
        fitters.check_writable(_OUTPUT.value)
        config = cli.config_of(_CONFIG) or codec_run.get_config()
        return codec_run.run(config, _DATA.value, _OUTPUT.value, _SEED.value)
    try:
        sampler = Sampler(_DATA.value, _SEED.value, _FRAMES.value)
        report = fitters.fit(_TEACHER.value, sampler, _OUTPUT.value, _ITERATIONS.value)
    except KeyboardInterrupt:
        progress.note(f"stopped; nothing was written to {_OUTPUT.value}")
        return 130
    progress.note(f"{os.path.join(_OUTPUT.value, fitted_file.FILE)} in {report['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    cli.run(main, FLAGS)
