"""Convert checkpoints from one format to another.

    python -m mert_jax.convert --input=PATH --output=PATH --to=hf|fairseq|orbax|stablehlo

The input is a workdir (or WORKDIR/checkpoints/STEP), a Hugging Face MERT directory or a fairseq
.pt file; its format is detected. The output is written completely or not at all.
"""

from absl import flags

from mert_jax import cli
from mert_jax.checkpoints import formats

FLAGS = flags.FlagValues()
define = cli.Define(FLAGS)
_INPUT = define.string("input", None, "Checkpoint to read.", required=True)
_OUTPUT = define.string("output", None, "Path to write; must not exist.", required=True)
_TO = define.enum("to", None, tuple(formats.FORMATS), "Format to write.", required=True)
_LICENSE = define.string("license", "", "Licence of the weights, for the model card.")
_MOMENTS = define.bool("moments", True, "Keep Adam's moments if there are any.")


def main() -> None:
    formats.convert(_INPUT.value, _OUTPUT.value, _TO.value, _LICENSE.value, _MOMENTS.value)


if __name__ == "__main__":
    cli.run(main, FLAGS)
