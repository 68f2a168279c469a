"""Converts a checkpoint from one format to another."""

import os
from pathlib import Path

import jax

from mert_jax import files, object_storage
from mert_jax.checkpoints import fairseq, huggingface, in_memory, stablehlo, workdir
from mert_jax.checkpoints.manager import checkpoint_steps
from mert_jax.checkpoints.reading import kind_of, read_checkpoint
from mert_jax.errors import UserError

WRITERS = {
    "hf": huggingface.write_checkpoint,
    "fairseq": fairseq.write_checkpoint,
    "orbax": workdir.write_checkpoint,
    "stablehlo": stablehlo.write_program,
}


def convert(source: str, output: str, to: str, licence: str = "", moments: bool = True) -> None:
    """Read the checkpoint at `source` and write it to `output` in the format `to`.

    `licence` replaces the checkpoint's. Raises UserError if either path is unusable; `output` is
    then not created.
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
        print(f"read {source} ({kind_of(local)}): {_summary(checkpoint)}", flush=True)
    if licence:
        checkpoint = checkpoint._replace(about=checkpoint.about._replace(licence=licence))
    with files.atomic_write(output) as path:
        if to != "fairseq":  # the only format that is one file
            os.mkdir(path)
        WRITERS[to](path, checkpoint)
        if to == "stablehlo":
            difference = stablehlo.check_program(path, checkpoint)
            print(f"reloaded: at most {difference:.1e} from the student itself", flush=True)
    written = [path for path in (Path(output), *Path(output).rglob("*")) if path.is_file()]
    size = sum(path.stat().st_size for path in written)
    print(f"wrote {output} ({size / 2**20:,.0f} MiB)")


def _summary(checkpoint: in_memory.Checkpoint) -> str:
    """Return two lines on a checkpoint: its sizes, heads and updates; its input and licence."""
    student, about = checkpoint.student, checkpoint.about
    heads = ", ".join(head.name for head in student.heads) or "none"
    norm = "pre-norm" if student.pre_norm else "post-norm"
    parameters = sum(x.size for x in jax.tree.leaves(checkpoint.params))
    return (
        f"{student.num_layers} {norm} layers of {student.hidden_size}, {parameters:,} parameters "
        f"in {about.dtype}, heads: {heads}; {checkpoint.step:,} updates, "
        f"{'with' if checkpoint.moments else 'without'} Adam's moments\n"
        f"  {about.sample_rate} Hz, waves {'normalised' if about.do_normalize else 'as they are'}; "
        f"licence: {about.licence or 'not stated (--license=NAME sets it)'}"
    )
