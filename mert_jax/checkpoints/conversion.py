"""Converts a checkpoint from one format to another."""

import os

from mert_jax import files, object_storage
from mert_jax.checkpoints import fairseq, huggingface, in_memory, stablehlo, workdir
from mert_jax.checkpoints.manager import checkpoint_steps
from mert_jax.checkpoints.reading import kind_of, read_checkpoint
from mert_jax.errors import UserError

# formats that are a directory; fairseq's is one file
DIRECTORY_WRITERS = {
    "hf": huggingface.write_checkpoint,
    "orbax": workdir.write_checkpoint,
    "stablehlo": stablehlo.write_program,
}
FORMATS = ("hf", "fairseq", "orbax", "stablehlo")


def convert(source: str, output: str, to: str, licence: str = "", moments: bool = True) -> None:
    """Read the checkpoint at `source` and write it to `output` in the format `to`.

    `licence` replaces the one of the checkpoint. Raises UserError if either path is unusable;
    `output` is then not created.
    """
    # atomic_write refuses it too, but only after the checkpoint has been read
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
    with files.atomic_write(output) as path:
        if to == "fairseq":
            fairseq.write_checkpoint(path, checkpoint)
        else:
            os.mkdir(path)
            DIRECTORY_WRITERS[to](path, checkpoint)
        if to == "stablehlo":
            difference = stablehlo.check_program(path, checkpoint)
            print(f"reloaded: at most {difference:.1e} from the student itself", flush=True)
    print(f"wrote {output} ({size(output) / 2**20:,.0f} MiB)")


def summary(checkpoint: in_memory.Checkpoint) -> str:
    """Return two lines on a checkpoint: its sizes, heads and updates; its input and licence."""
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
    """Return the bytes of a file, or of all files below a directory."""
    if os.path.isfile(path):
        return os.path.getsize(path)
    return sum(
        os.path.getsize(os.path.join(folder, name))
        for folder, _, names in os.walk(path)
        for name in names
    )
