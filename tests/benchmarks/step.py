"""The whole pretraining step against the same recipe in PyTorch: clips of 5 s, EnCodec's codes and
the CQT computed on the fly, noise mixture, masks, student, objective, optimiser.

Rows `step_95m` and, by name only, `step_330m`: seconds a step, with the model's FLOPs a second
beside it. On CPUs in float32, 4 clips; on a GPU in bfloat16, 16. The peer (`pytorch_recipe`) is the
faster one of torch's eager mode and torch.compile; before, loss and gradient norm of both are
compared on one batch, mask and mixture, without dropout.

python -m tests.benchmarks.step [95m | 330m] [CLIPS]
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
from mert_jax.cli import UserError
from tests.benchmarks import measure, rvq_vae

SIZES = {"95m": "base", "330m": "large"}
MODES = ("eager", "compiled")
CASE = "MERT_JAX_BENCHMARK_CASE"  # a variable: processes measured for memory inherit it
DROPOUTS = ("input_dropout", "hidden_dropout", "attention_dropout", "activation_dropout")
# no random number of layers, which torch.compile would compile again and again
SAME = {"model.layerdrop": 0.0, "accumulation": 1, "model.unroll": 1}


def config(size: str, clips: int, checkpoint: str, half: bool, dropout: bool) -> ConfigDict:
    """The size's recipe for a batch of so many clips."""
    found = mert_v1.get_config(SIZES[size])
    found.update_from_flattened_dict(
        SAME | {"batch_size": clips, "group": clips, "teacher.rvq_vae.checkpoint": checkpoint}
    )
    found.model.dtype = "bfloat16" if half else "float32"
    if not dropout:
        found.model.update(dict.fromkeys(DROPOUTS, 0.0))
    return found


def _audio(config: ConfigDict) -> np.ndarray:
    samples = config.teacher.rvq_vae.context + config.data.num_samples
    return np.int16(10_000 * rvq_vae.music(config.batch_size, samples))


# the libraries are imported where they are used: a process measured for memory has its own only
class Ours:
    """Our step for a config, its state begun."""

    def __init__(self, config: ConfigDict):
        import jax

        from mert_jax import recipe

        made = recipe.make_teachers(recipe.check(config))
        self.student = recipe.student(config, made)
        self.optimizer = recipe.make_optimizer(config)
        self.objective = recipe.objective(config, self.student, made)
        self.teachers = jax.device_put({name: teacher.params for name, teacher in made.items()})
        audio = _audio(config)
        self.batch = jax.device_put({"audio": audio, "looped": np.zeros(len(audio), bool)})
        self.config = config

    def step(self) -> Callable[[], Any]:
        """A call of the jitted update, whose state goes on."""
        import jax
        from flax import linen as nn

        from mert_jax import recipe, step

        state = jax.jit(lambda: nn.unbox(recipe.init(self.config, self.student, self.optimizer)))()
        sizes = dict(accumulation=1, group=self.config.group)
        options = dict(objective=self.objective, optimizer=self.optimizer)
        update = jax.jit(functools.partial(step.train_step, **options, **sizes), donate_argnums=0)

        def run() -> Any:
            nonlocal state
            state, metrics = update(state, self.teachers, self.batch, jax.random.key(0))
            return jax.block_until_ready(metrics)

        return run

    def check(self, params: Any) -> tuple[float, float, np.ndarray, np.ndarray]:
        """Loss a masked frame, norm of its gradient, and the mask and mixture they are of."""
        import jax
        import jax.numpy as jnp
        import optax

        from mert_jax import step

        objective, audio = self.objective, self.batch["audio"]
        key, rows = jax.random.key(0), jnp.arange(len(audio))
        keys = [step.row_keys(each, rows) for each in jax.random.split(key, 3)[:2]]
        wave = audio[:, self.config.teacher.rvq_vae.context :].astype(jnp.float32) / 32768
        mask = objective.mask(keys[0], objective.num_frames(wave.shape[-1]))
        loss = functools.partial(step.loss_fn, objective=objective, train=True)
        gradient, sums = jax.jit(jax.grad(loss, has_aux=True))(
            params, self.teachers, audio, rows, key
        )
        norm = optax.tree.norm(gradient) / sums.frames
        mixed = np.asarray(objective.mixture(keys[1], wave))
        return float(sums.loss / sums.frames), float(norm), np.asarray(mask), mixed


def _weights(peer: Any, student: Any) -> Any:
    """The peer's weights as our parameters."""
    from mert_jax.formats import names

    array = lambda x: x.detach().cpu().numpy()
    dense = lambda x: {"kernel": array(x.weight).T, "bias": array(x.bias)}
    state = {name: array(x) for name, x in peer.student.state_dict().items()}
    return names.params_from_hf(state, student.clone(heads=())) | {
        "rvq_vae_proj": dense(peer.code_proj),
        "rvq_vae_codebooks": array(peer.codebooks),
        "cqt_proj": dense(peer.cqt_proj),
    }


def check(size: str, clips: int, checkpoint: str, device: str) -> None:
    """UserError where loss or gradient norm of the two sides differ by more than 1e-3."""
    import torch

    from tests.benchmarks.pytorch_recipe import Recipe

    torch.manual_seed(0)
    plain = config(size, clips, checkpoint, half=False, dropout=False)
    ours, peer = Ours(plain), Recipe(plain, checkpoint, compiled=False, device=device)
    *found, mask, mixed = ours.check(_weights(peer, ours.student))
    tensor = functools.partial(torch.tensor, device=device)
    codes, cqt, _ = peer.targets(tensor(_audio(plain)))
    theirs = peer.update(codes, cqt, tensor(mixed), tensor(mask))
    for name, a, b in zip(("loss", "gradient norm"), found, theirs, strict=True):
        if abs(a - b) > 1e-3 * abs(b):
            raise UserError(f"step_{size}: our {name} is {a:.6g}, PyTorch's {b:.6g}")


def side(name: str, size: str, clips: int, checkpoint: str, device: str) -> Callable[[], Any]:
    """A call of one step: `ours`, or the peer's `eager` or `compiled`."""
    settings = config(size, clips, checkpoint, half=device == "cuda", dropout=True)
    if name == "ours":
        return Ours(settings).step()
    import torch

    from tests.benchmarks.pytorch_recipe import Recipe

    torch.set_num_threads(measure.THREADS)
    peer = Recipe(settings, checkpoint, name == "compiled", device)
    audio = torch.tensor(_audio(settings), device=device)
    return lambda: peer.step(audio)


def run_case() -> None:
    """What a peak of memory is measured of."""
    name, size, clips, checkpoint, device = os.environ[CASE].split()
    side(name, size, int(clips), checkpoint, device)()


def rows(sizes: Sequence[str] = ("95m",), clips: int = 0) -> Iterator[dict[str, Any]]:
    """The rows `step_SIZE`, with the model's `flops_per_s` of both sides."""
    try:
        import torch
    except ImportError as e:
        raise UserError(f"step: {e}; pip install mert_jax[peers]") from e
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clips = clips or (16 if device == "cuda" else 4)
    with tempfile.TemporaryDirectory() as folder:
        rvq_vae.write_checkpoint(folder)
        for size in sizes:
            check(size, min(clips, 4), folder, device)
            case = size, clips, folder, device
            seconds = measure.interleaved(
                {name: side(name, *case) for name in ("ours", *MODES)}, 3 if device == "cpu" else 20
            )
            best = min(MODES, key=lambda mode: np.median(seconds[mode]))
            mib = []
            for name in ("ours", best):
                os.environ[CASE] = " ".join(map(str, (name, *case)))
                mib.append(measure.peak_mib(run_case))
            label = f"PyTorch recipe, {best}, {clips} clips"
            row = measure.row(f"step_{size}", label, seconds["ours"], seconds[best], tuple(mib))
            settings = config(size, clips, folder, half=False, dropout=True)
            flops = 3 * clips * Ours(settings).student.flops(settings.data.num_samples)
            yield row | {"flops_per_s": [flops / row["ours_s"], flops / row["peer_s"]]}


if __name__ == "__main__":
    sizes = [each for each in sys.argv[1:] if each in SIZES]
    numbers = [int(each) for each in sys.argv[1:] if each not in SIZES]
    for each in rows(sizes or ("95m",), *numbers):
        print(each, flush=True)
