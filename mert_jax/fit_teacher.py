"""Fit a teacher to a prepared dataset: frames of music -> one file that `teachers.make` reads.

    python -m mert_jax.fit_teacher --teacher=kmeans --data=DATA --output=DIR

DATA is what `mert_jax.prepare` wrote. DIR gets teacher.safetensors (for
`teachers.make("kmeans", checkpoint=DIR)` and `--config.teacher.kmeans.checkpoint=DIR`), report.json
and report.png: how many codes are in use, and how much of the frames' variance the codebooks leave,
on the train split and on the tracks held out. The same seed, data and sizes give the same bytes.

    python -m mert_jax.fit_teacher --teacher=rvq_vae --config=configs/codec.py \
        --data=DATA --output=DIR

trains a codec instead (full size without --config), resumes when run again, and writes it
in EnCodec's format, for `make` and `transformers.EncodecModel.from_pretrained`, with a few clips of
the tracks held out before and after in DIR/listen.
"""

import os

from absl import flags
from ml_collections import config_flags

from mert_jax import cli, progress
from mert_jax.errors import UserError
from mert_jax.fitting import cluster_run, codec_run
from mert_jax.fitting.registry import fitters
from mert_jax.fitting.sampling import Sampler
from mert_jax.teachers import fitted_file

FLAGS = flags.FlagValues()

_TEACHER = flags.DEFINE_string(
    "teacher", None, "Which teacher: kmeans, mel_rvq, ...", flag_values=FLAGS
)
_DATA = flags.DEFINE_string("data", None, "Directory of a prepared dataset.", flag_values=FLAGS)
_OUTPUT = flags.DEFINE_string("output", None, "Directory of the fitted teacher.", flag_values=FLAGS)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Of the frames drawn and of the first centres.", 0, flag_values=FLAGS
)
_FRAMES = flags.DEFINE_integer(
    "frames",
    100_000,
    "Frames drawn at most (75 a second); more take more memory and time.",
    1,
    flag_values=FLAGS,
)
_ITERATIONS = flags.DEFINE_integer(
    "iterations", 50, "Steps of k-means a codebook at most.", 1, flag_values=FLAGS
)
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Of rvq_vae: such as configs/codec.py.", flag_values=FLAGS
)
CODEC = "rvq_vae"  # trained by gradient descent; the others are clusters or statistics


def _check_flags(teacher: str) -> None:
    """Raise UserError for a flag that would do nothing."""
    of_clusters = [f"--{name}" for name in ("frames", "iterations") if FLAGS[name].present]
    of_codec = ["--config"] if FLAGS["config"].present else []
    if idle := of_clusters if teacher == CODEC else of_codec:
        other = "of clusters, not of" if teacher == CODEC else f"of {CODEC} alone, not of"
        raise UserError(
            f"{' and '.join(idle)}: a setting {other} --teacher={teacher}; leave it out"
        )


def main() -> int:
    """Run the command and return its exit code."""
    known = ", ".join([*fitters(), CODEC])
    if not (_TEACHER.value and _DATA.value and _OUTPUT.value):
        raise UserError(
            f"--teacher, --data and --output are needed: --teacher=NAME (one of {known}) "
            "--data=PREPARED_DIR --output=DIR"
        )
    if _TEACHER.value not in (*fitters(), CODEC):
        raise UserError(f"--teacher={_TEACHER.value} cannot be fitted; it is one of {known}")
    _check_flags(_TEACHER.value)
    if _TEACHER.value == CODEC:
        cluster_run.check_writable(_OUTPUT.value)
        config = cli.config_of(_CONFIG) or codec_run.get_config()
        return codec_run.run(config, _DATA.value, _OUTPUT.value, _SEED.value)
    try:
        sampler = Sampler(_DATA.value, _SEED.value, _FRAMES.value)
        report = cluster_run.fit(
            _TEACHER.value, sampler, _OUTPUT.value, _SEED.value, _ITERATIONS.value
        )
    except KeyboardInterrupt:
        progress.note(f"stopped; nothing was written to {_OUTPUT.value}")
        return 130
    progress.note(f"{os.path.join(_OUTPUT.value, fitted_file.FILE)} in {report['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    cli.run(main, FLAGS)
