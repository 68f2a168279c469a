"""Checkpoints from one form to another.

    python -m mert_jax.convert --input=PATH --output=PATH --to=hf|fairseq|orbax|stablehlo

The input is a workdir of ours (or WORKDIR/checkpoints/STEP), a Hugging Face MERT directory or a
fairseq .pt file; what it is, is found out. The output appears when it is whole.
"""

import os

from absl import flags

from mert_jax import cli, object_storage
from mert_jax import files as atomic
from mert_jax.checkpoints import fairseq, huggingface, in_memory, stablehlo, workdir
from mert_jax.checkpoints.manager import checkpoint_steps
from mert_jax.checkpoints.reading import kind_of, read_checkpoint
from mert_jax.errors import UserError

FLAGS = flags.FlagValues()
_INPUT = flags.DEFINE_string("input", None, "Checkpoint to read.", required=True, flag_values=FLAGS)
_OUTPUT = flags.DEFINE_string(
    "output", None, "What to write; must not exist.", required=True, flag_values=FLAGS
)
_TO = flags.DEFINE_enum(
    "to",
    None,
    ["hf", "fairseq", "orbax", "stablehlo"],
    "Format to write.",
    required=True,
    flag_values=FLAGS,
)
_LICENSE = flags.DEFINE_string(
    "license", "", "Licence of the weights, for the model card.", flag_values=FLAGS
)
_MOMENTS = flags.DEFINE_bool(
    "moments", True, "Keep Adam's moments where there are any.", flag_values=FLAGS
)

DIRECTORIES = {
    "hf": huggingface.write_checkpoint,
    "orbax": workdir.write_checkpoint,
    "stablehlo": stablehlo.write_program,
}


def convert(source: str, output: str, to: str, licence: str = "", moments: bool = True) -> None:
    """Read the checkpoint at `source` and write it to `output`; `licence` replaces the one it has.

    Raises UserError for what is wrong with either; `output` is whole or not there.
    """
    if os.path.exists(output):
        raise UserError(f"{output} exists already; choose another output, or remove it first")
    if object_storage.is_remote(output):
        raise UserError(
            f"--output={output}: checkpoints are converted on a local disk; copy the result there"
        )
    with object_storage.fetched(source, checkpoint_steps) as local:
        checkpoint = read_checkpoint(local, moments)
        print(f"read {source} ({kind_of(local)}): {summary(checkpoint)}", flush=True)
    if licence:
        checkpoint = checkpoint._replace(about=checkpoint.about._replace(licence=licence))
    with atomic.atomic_write(output) as path:
        if to == "fairseq":
            fairseq.write_checkpoint(path, checkpoint)
        else:
            os.mkdir(path)
            DIRECTORIES[to](path, checkpoint)
        if to == "stablehlo":
            difference = stablehlo.check_program(path, checkpoint)
            print(f"reloaded: at most {difference:.1e} from the student itself", flush=True)
    print(f"wrote {output} ({size(output) / 2**20:,.0f} MiB)")


def summary(checkpoint: in_memory.Checkpoint) -> str:
    """What was read, in a line or two."""
    student, about = checkpoint.student, checkpoint.about
    heads = ", ".join(head.name for head in student.heads) or "none"
    norm = "pre-norm" if student.pre_norm else "post-norm"
    return (
        f"{student.num_layers} {norm} layers of {student.hidden_size}, "
        f"{in_memory.count_parameters(checkpoint):,} parameters in {about.dtype}, heads: "
        f"{heads}; {checkpoint.step:,} updates, "
        f"{'with' if checkpoint.moments else 'without'} Adam's moments\n"
        f"  {about.sample_rate} Hz, waves {'normalised' if about.do_normalize else 'as they are'}; "
        f"licence: {about.licence or 'not stated (--license=NAME sets it)'}"
    )


def size(path: str) -> int:
    """Bytes of a file, or of all files in a directory."""
    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(
        os.path.getsize(os.path.join(folder, name))
        for folder, _, files in os.walk(path)
        for name in files
    )


def main() -> int | None:
    """Run the command and return its exit code."""
    return convert(_INPUT.value, _OUTPUT.value, _TO.value, _LICENSE.value, _MOMENTS.value)


if __name__ == "__main__":
    cli.run(main, FLAGS)
