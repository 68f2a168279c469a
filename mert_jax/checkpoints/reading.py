"""Reading a checkpoint of any kind."""

import os

from mert_jax import object_storage
from mert_jax.checkpoints import fairseq, huggingface, manager, workdir
from mert_jax.checkpoints.in_memory import Checkpoint
from mert_jax.errors import UserError


def kind_of(path: str | os.PathLike) -> str:
    """workdir, huggingface or fairseq, from what lies at `path`; UserError for anything else."""
    join = lambda *names: os.path.join(path, *names)
    if os.path.isdir(path):
        # a workdir has a config.json too: the run's
        if os.path.isdir(join("checkpoints")) or os.path.exists(join("_CHECKPOINT_METADATA")):
            return "workdir"
        if os.path.exists(join("config.json")):
            return "huggingface"
        raise UserError(
            f"{path} is no checkpoint: it has neither checkpoints/ (a run) nor config.json (a "
            "Hugging Face directory)"
        )
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist")
    if os.fspath(path).endswith((".safetensors", ".bin")):
        raise UserError(f"{path} is weights without their config.json: give its folder")
    return "fairseq"


def read_checkpoint(path: str | os.PathLike, moments: bool = True) -> Checkpoint:
    """The checkpoint at `path`, with Adam's `moments` where it has them and they are asked for.

    Raises UserError for what is none, cut short, of another architecture, or has tensors that are
    missing, unexpected, of another shape or not finite.
    """
    readers = {
        "workdir": workdir.read_checkpoint,
        "huggingface": huggingface.read_checkpoint,
        "fairseq": fairseq.read_checkpoint,
    }
    with object_storage.fetched(os.fspath(path), manager.checkpoint_steps) as local:
        return readers[kind_of(local)](local, moments)
