"""Checkpoints of every format: detection, reading, and conversion from one to another."""

import os
from pathlib import Path

import jax

from mert_jax import files
from mert_jax.checkpoints import fairseq, huggingface, manager, object_storage, stablehlo, workdir
from mert_jax.checkpoints.in_memory import Checkpoint
from mert_jax.errors import UserError

FORMATS = {"hf": huggingface, "fairseq": fairseq, "orbax": workdir, "stablehlo": stablehlo}


def kind_of(path: str | os.PathLike) -> str:
    """Return the key of `FORMATS` for the checkpoint at `path`. Raises UserError if it is none."""
    path = os.fspath(path)
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist")
    if not os.path.isdir(path):
        if path.endswith((".safetensors", ".bin")):
            raise UserError(f"{path} is weights without their config.json; give its folder")
        return "fairseq"
    names = os.listdir(path)
    if "checkpoints" in names or "_CHECKPOINT_METADATA" in names:
        return "orbax"  # first, since the run's settings are a config.json too
    if "config.json" in names:
        return "hf"
    lacks = "it has neither checkpoints/ nor config.json; give a workdir or a Hugging Face folder"
    raise UserError(f"{path} is not a checkpoint: {lacks}")


def read_checkpoint(path: str | os.PathLike, moments: bool = True) -> Checkpoint:
    """Read a checkpoint, with Adam's `moments` on request; UserError if damaged or foreign."""
    with object_storage.fetched(os.fspath(path), manager.checkpoint_steps) as local:
        return FORMATS[kind_of(local)].read_checkpoint(local, moments)


def convert(source: str, output: str, to: str, licence: str = "", moments: bool = True) -> None:
    """Write the checkpoint at `source` to `output` in the format `to`, completely or not at all."""
    # atomic_write refuses it too, but only after the checkpoint has been read
    if os.path.exists(output):
        raise UserError(f"{output} exists already; choose another output, or remove it first")
    if object_storage.is_remote(output):
        raise UserError(f"--output={output}: convert on a local disk, and copy the result there")
    checkpoint = read_checkpoint(source, moments)
    if licence:
        checkpoint = checkpoint._replace(about=checkpoint.about._replace(licence=licence))
    print(_summary(checkpoint), flush=True)
    with files.atomic_write(output) as path:
        if to != "fairseq":  # the only format that is one file
            os.mkdir(path)
        FORMATS[to].write_checkpoint(path, checkpoint)
    paths = (Path(output), *Path(output).rglob("*"))
    size = sum(path.stat().st_size for path in paths if path.is_file())
    print(f"wrote {output} ({size / 2**20:,.0f} MiB)")


def _summary(checkpoint: Checkpoint) -> str:
    student, about = checkpoint.student, checkpoint.about
    heads = ", ".join(head.name for head in student.heads) or "none"
    norm = "pre-norm" if student.pre_norm else "post-norm"
    parameters = sum(x.size for x in jax.tree.leaves(checkpoint.params))
    waves = "normalised" if about.do_normalize else "as they are"
    return (
        f"read {about.lineage[-1]}: {student.num_layers} {norm} layers of {student.hidden_size}, "
        f"{parameters:,} parameters in {about.dtype}, heads: {heads}; {checkpoint.step:,} updates, "
        f"{'with' if checkpoint.moments else 'without'} Adam's moments\n"
        f"  {about.sample_rate} Hz, waves {waves}; "
        f"licence: {about.licence or 'not stated (--license=NAME sets it)'}"
    )
