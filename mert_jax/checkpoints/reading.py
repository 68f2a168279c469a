"""Reading a checkpoint of any kind."""

import os

from mert_jax import object_storage
from mert_jax.checkpoints import fairseq, huggingface, manager, workdir
from mert_jax.checkpoints.in_memory import Checkpoint
from mert_jax.errors import UserError

READERS = {
    "workdir": workdir.read_checkpoint,
    "huggingface": huggingface.read_checkpoint,
    "fairseq": fairseq.read_checkpoint,
}


def kind_of(path: str | os.PathLike) -> str:
    """Return the key of `READERS` for the checkpoint at `path`. Raises UserError if it is none."""
    path = os.fspath(path)
    if os.path.isdir(path):
        names = os.listdir(path)
        if "checkpoints" in names or "_CHECKPOINT_METADATA" in names:
            return "workdir"  # first, since the run's settings are a config.json too
        if "config.json" in names:
            return "huggingface"
        raise UserError(
            f"{path} is not a checkpoint: it has neither checkpoints/ (a run) nor config.json (a "
            "Hugging Face directory)"
        )
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist")
    if path.endswith((".safetensors", ".bin")):
        raise UserError(f"{path} is weights without their config.json; give its folder")
    return "fairseq"


def read_checkpoint(path: str | os.PathLike, moments: bool = True) -> Checkpoint:
    """Read the checkpoint at `path`, with Adam's `moments` if it has them and they are wanted.

    Raises UserError for anything that is not a checkpoint, is cut short or of another architecture,
    or has tensors that are missing, unexpected, misshapen or not finite.
    """
    with object_storage.fetched(os.fspath(path), manager.checkpoint_steps) as local:
        return READERS[kind_of(local)](local, moments)
