"""The complete pretraining step against the same recipe in PyTorch.

The step on clips of 5 s consists of EnCodec's codes and the CQT computed on the fly, noise mixture,
masks, student, objective and optimiser. The rows are `step_SIZE` and, with codes that come with the
batch, `step_SIZE_stored`: seconds per step, the model's FLOPs per second, and MFU if the device's
peak is known. CPUs run 4 clips in float32; a GPU runs 16 in bfloat16, and the memory is the GPU's.
The peer (`pytorch_recipe`) is the faster of torch's eager mode and torch.compile. Before timing,
loss and gradient norm of both sides are compared on one batch, mask and mixture, without dropout.

python -m tests.benchmarks.step [95m | 330m | 95m_stored | 330m_stored ...] [CLIPS]
"""

import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs import mert_v1
from mert_jax import hardware
from mert_jax.constants import HOP_LENGTH
from mert_jax.errors import UserError
from tests.benchmarks import measure, rvq_vae

SIZES = {"95m": "base", "330m": "large"}
NAMES = ("95m", "330m", "95m_stored", "330m_stored")
MODES = ("eager", "compiled")
DROPOUTS = ("input_dropout", "hidden_dropout", "attention_dropout", "activation_dropout")
# without layer drop: torch.compile would recompile for every number of layers
SAME = {"model.layerdrop": 0.0, "model.unroll": 1, "model.remat": "dots", "accumulation": 1}


def config(name: str, clips: int, checkpoint: str, half: bool, dropout: bool) -> ConfigDict:
    """Return the recipe of one of `NAMES` for `clips` clips; stored codes need no checkpoint."""
    size, _, stored = name.partition("_")
    found = mert_v1.get_config(SIZES[size])
    found.update_from_flattened_dict(SAME | {"batch_size": clips, "group": clips})
    found.teacher.rvq_vae.checkpoint = "" if stored else checkpoint
    found.model.dtype = "bfloat16" if half else "float32"
    if not dropout:
        found.model.update(dict.fromkeys(DROPOUTS, 0.0))
    return found


def batch(config: ConfigDict) -> dict[str, Any]:
    """Return int16 `audio` [B, context + N] and, without a checkpoint, `codes` [B, T, K]."""
    teacher, samples = config.teacher.rvq_vae, config.data.num_samples
    stored = not teacher.checkpoint
    audio = rvq_vae.music(config.batch_size, samples + (0 if stored else teacher.context))
    found = {"audio": np.int16(10_000 * audio), "looped": np.zeros(len(audio), bool)}
    if stored:
        shape = len(audio), samples // HOP_LENGTH, rvq_vae.BOOKS
        codes = np.random.default_rng(0).integers(1024, size=shape, dtype=np.uint16)
        found["codes"] = {"rvq_vae": codes}
    return found


# each side's process imports its own libraries only
class Ours:
    """The step of mert_jax for a config, with an initial state."""

    def __init__(self, config: ConfigDict):
        import jax

        from mert_jax.planning import abstract_teachers
        from mert_jax.pretraining import build as recipe

        computed = config.teacher.rvq_vae.checkpoint
        stored = abstract_teachers.stored_codes(config, "computed" if computed else "stored")
        made = recipe.make_teachers(recipe.check(config), stored)
        self.student = recipe.make_student(config, made, stored)
        self.optimizer = recipe.make_optimizer(config)
        self.objective = recipe.make_objective(config, self.student, made)
        self.teachers = jax.device_put({name: teacher.params for name, teacher in made.items()})
        self.batch = jax.device_put(batch(config))
        self.config = config

    def compiled(self) -> tuple[Callable[[], Any], Any]:
        """A call of the update, whose state goes on, and its compiled program."""
        import jax
        from flax import linen as nn

        from mert_jax.pretraining import build as recipe
        from mert_jax.pretraining import step

        state = jax.jit(lambda: nn.unbox(recipe.init(self.config, self.student, self.optimizer)))()
        sizes = dict(accumulation=1, group=self.config.group)
        options = dict(objective=self.objective, optimizer=self.optimizer)
        update = jax.jit(functools.partial(step.train_step, **options, **sizes), donate_argnums=0)
        key = jax.random.key(0)
        update = update.lower(state, self.teachers, self.batch, key).compile()

        def run() -> Any:
            nonlocal state
            state, metrics = update(state, self.teachers, self.batch, key)
            return jax.block_until_ready(metrics)

        return run, update

    def check(self, params: Any) -> tuple[float, float, np.ndarray, np.ndarray]:
        """Return loss per masked frame, norm of its gradient, and the mask and mixture used."""
        import jax
        import jax.numpy as jnp
        import optax

        from mert_jax.pretraining import step

        objective, audio = self.objective, self.batch["audio"]
        key, rows = jax.random.key(0), jnp.arange(len(audio))
        keys = [step.row_keys(each, rows) for each in jax.random.split(key, 3)[:2]]
        wave = audio[:, -self.config.data.num_samples :].astype(jnp.float32) / 32768
        mask = objective.mask(keys[0], objective.num_frames(wave.shape[-1]))
        loss = functools.partial(step.loss_fn, objective=objective, train=True)
        with jax.default_matmul_precision("float32"):  # GPUs round to TF32 otherwise
            gradient, sums = jax.jit(jax.grad(loss, has_aux=True))(
                params, self.teachers, audio, rows, key
            )
        norm = optax.tree.norm(gradient) / sums.frames
        mixed = np.asarray(objective.mixture(keys[1], wave))
        return float(sums.loss / sums.frames), float(norm), np.asarray(mask), mixed


def _weights(peer: Any, student: Any) -> Any:
    """Return the peer's weights as parameters of mert_jax."""
    from mert_jax.checkpoints import tensor_names as names

    def array(x):
        return x.detach().cpu().numpy()

    def dense(x):
        return {"kernel": array(x.weight).T, "bias": array(x.bias)}

    state = {name: array(x) for name, x in peer.student.state_dict().items()}
    return names.params_from_hf(state, student.clone(heads=())) | {
        "rvq_vae_proj": dense(peer.code_proj),
        "rvq_vae_codebooks": array(peer.codebooks),
        "cqt_proj": dense(peer.cqt_proj),
    }


def check(name: str, clips: int, checkpoint: str, device: str) -> None:
    """Raise UserError if loss or gradient norm of the two sides differ by more than 1e-3."""
    import torch

    from tests.benchmarks.pytorch_recipe import Recipe

    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # its convolutions round to TF32 otherwise
    size = name.partition("_")[0]  # all rows of a size have the same student and objective
    plain = config(size, clips, checkpoint, half=False, dropout=False)
    ours, peer = Ours(plain), Recipe(plain, checkpoint, compiled=False, device=device)
    *found, mask, mixed = ours.check(_weights(peer, ours.student))
    tensor = functools.partial(torch.tensor, device=device)
    codes, cqt, _ = peer.targets(tensor(batch(plain)["audio"]))
    theirs = peer.update(codes, cqt, tensor(mixed), tensor(mask))
    for what, a, b in zip(("loss", "gradient norm"), found, theirs, strict=True):
        if abs(a - b) > 1e-3 * abs(b):
            raise UserError(f"step_{name}: our {what} is {a:.6g}, PyTorch's {b:.6g}")


def ours(name: str, clips: int, checkpoint: str, device: str) -> Callable[[], Any]:
    """Build a step of mert_jax."""
    settings = config(name, clips, checkpoint, half=device == "cuda", dropout=True)
    return Ours(settings).compiled()[0]


def peer(mode: str, name: str, clips: int, checkpoint: str, device: str) -> Callable[[], Any]:
    """Build a step of the peer, `eager` or `compiled`."""
    import torch

    from tests.benchmarks.pytorch_recipe import Recipe

    torch.set_num_threads(measure.THREADS)
    settings = config(name, clips, checkpoint, half=device == "cuda", dropout=True)
    recipe = Recipe(settings, checkpoint, mode == "compiled", device)
    found = batch(settings)
    audio, codes = torch.tensor(found["audio"], device=device), None
    if "codes" in found:
        codes = torch.tensor(np.int64(found["codes"]["rvq_vae"]), device=device)
    return lambda: recipe.step(audio, codes)


def row(name: str, clips: int, checkpoint: str, device: str) -> dict[str, Any]:
    """Return the row `step_NAME`, with both sides' `flops_per_s` and, on a known device, `mfu`."""
    import jax

    check(name, min(clips, 4), checkpoint, device)
    settings = config(name, clips, checkpoint, half=device == "cuda", dropout=True)
    case = name, clips, checkpoint, device
    sides = {"ours": (ours, *case)} | {mode: (peer, mode, *case) for mode in MODES}
    times = measure.apart(sides, calls=3 if device == "cpu" else 20, device=device)
    best = measure.faster(times, MODES)
    label = f"PyTorch recipe, {best}, {clips} clips"
    found = measure.row(f"step_{name}", label, times["ours"], times[best])
    flops = 3 * clips * Ours(settings).student.flops(settings.data.num_samples)
    found = measure.with_flops(found, flops)
    if peak := hardware.peak_flops(jax.devices()[0].device_kind):
        found["mfu"] = [rate / peak for rate in found["flops_per_s"]]
    return found


def rows(names: Sequence[str] = ("95m",), clips: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the rows `step_NAME`; UserError without torch, or if only torch sees the GPU."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer is on the same GPU
    import jax

    try:
        import torch
    except ImportError as e:
        raise UserError(f"step: {e}; pip install mert_jax[peers]") from e
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and jax.default_backend() != "gpu":
        raise UserError("step: torch has a GPU and jax none; pip install mert_jax[cuda]")
    with tempfile.TemporaryDirectory() as folder:
        rvq_vae.write_checkpoint(folder)
        for name in names:
            yield row(name, clips or (16 if device == "cuda" else 4), folder, device)


if __name__ == "__main__":
    names = [each for each in sys.argv[1:] if each in NAMES]
    numbers = [int(each) for each in sys.argv[1:] if each not in NAMES]
    for each in rows(names or ("95m",), *numbers):
        print(each, flush=True)
