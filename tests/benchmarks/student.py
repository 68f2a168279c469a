"""The student against transformers' Hubert with the same weights and clips of 5 s in float32.

Rows `student_SIZE_forward_bB` and `student_SIZE_backward_bB` (forward and backward of the mean
square of the last hidden state), with the model's FLOPs per second. The peer is the faster of
torch's eager mode and torch.compile. Neither side has dropout; mert_jax uses remat "dots", which
takes less memory and no more time on CPUs.

python -m tests.benchmarks.student [NAME ...]
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mert_jax.errors import UserError
from tests.benchmarks import measure
from tests.benchmarks.rvq_vae import music

SIZES = {
    "95m": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
    "330m": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
}
CASES = {
    f"student_{size}_{what}_b{clips}": (size, what == "backward", clips)
    for size, what, clips in (
        *(("95m", "forward", 1), ("95m", "forward", 4), ("95m", "backward", 4)),
        *(("330m", "forward", 1), ("330m", "forward", 4), ("330m", "backward", 1)),
    )
}
MODES = ("eager", "compiled")
SAMPLES = 120_000


def names(size: str) -> list[str]:
    """The cases of a size."""
    return [case for case, (of, _, _) in CASES.items() if of == size]


# each side's process imports its own libraries only
def _config(size: str) -> Any:
    from transformers import HubertConfig

    width = SIZES[size]["hidden_size"]
    # in MERT's configs both sizes normalise the first convolution over time
    options = dict(intermediate_size=4 * width, do_stable_layer_norm=size == "330m")
    return HubertConfig(**SIZES[size], **options)


def _peer(size: str) -> Any:
    import torch
    from transformers import HubertModel

    torch.set_num_threads(measure.THREADS)
    torch.manual_seed(0)
    return HubertModel(_config(size)).eval()


def _student(case: str) -> Any:
    from mert_jax.checkpoints import huggingface

    size, _, _ = CASES[case]
    options = dict(SIZES[size], intermediate_size=4 * SIZES[size]["hidden_size"])
    student = huggingface.student(options | {"do_stable_layer_norm": size == "330m"})
    return student.clone(remat="dots")


def ours(case: str, state: dict[str, np.ndarray] | None = None) -> Callable[[], Any]:
    """Build a call of mert_jax: the last hidden state, or the gradients."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from mert_jax.checkpoints.tensor_names import params_from_hf

    _, backward, clips = CASES[case]
    student = _student(case)
    if state is None:

        def init():
            return nn.unbox(student.init(jax.random.key(0), jnp.zeros((1, 4_000)))["params"])

        params = jax.jit(init)()
    else:
        params = jax.device_put(params_from_hf(state, student))
    wave = jax.device_put(music(clips, SAMPLES))

    def last(params, wave):
        return student.apply({"params": params}, wave).last_hidden_state

    def loss(params, wave):
        return jnp.square(last(params, wave)).mean()

    call = jax.jit(jax.grad(loss) if backward else last)
    return lambda: jax.block_until_ready(call(params, wave))


def transformers(case: str, mode: str, model: Any = None) -> Callable[[], Any]:
    """Build a call of the peer: the last hidden state, or gradients left on its parameters."""
    import torch

    size, backward, clips = CASES[case]
    model = model or _peer(size)
    wave = torch.tensor(music(clips, SAMPLES))
    forward = torch.compile(model) if mode == "compiled" else model

    def run() -> Any:
        if not backward:
            with torch.no_grad():
                return forward(wave).last_hidden_state.numpy()
        model.zero_grad()
        forward(wave).last_hidden_state.square().mean().backward()

    return run


def _error(case: str, ours: Any, theirs: Any, model: Any) -> float:
    """Return the largest difference of the results, or that of gradients relative to their norm."""
    if not CASES[case][1]:
        return float(np.abs(np.asarray(ours) - theirs).max())
    import jax

    from mert_jax.checkpoints import huggingface
    from mert_jax.checkpoints.tensor_names import params_from_hf

    student = huggingface.student(model.config.to_dict())

    def zero(p):
        return p.detach() * 0  # the mask's embedding has no gradient

    gradients = {n: (zero(p) if p.grad is None else p.grad) for n, p in model.named_parameters()}
    theirs = params_from_hf({n: x.numpy() for n, x in gradients.items()}, student)

    def flat(tree):
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])

    return measure.relative_l2(flat(ours), flat(theirs))


def _check(case: str) -> None:
    """Raise UserError if the two sides differ by more than 1e-3."""
    try:
        model = _peer(CASES[case][0])
    except ImportError as e:
        raise UserError(f"{case}: {e}; pip install mert_jax[peers]") from e
    state = {name: x.numpy() for name, x in model.state_dict().items()}
    error = _error(case, ours(case, state)(), transformers(case, "eager", model)(), model)
    if error > 1e-3:
        raise UserError(f"{case}: {error:.1e} from transformers'")


def row(case: str) -> dict[str, Any]:
    """Return one row, after checking that both sides compute the same."""
    _check(case)
    sides = {"ours": (ours, case)} | {mode: (transformers, case, mode) for mode in MODES}
    times = measure.apart(sides)
    best = measure.faster(times, MODES)
    _, backward, clips = CASES[case]
    flops = (3 if backward else 1) * clips * _student(case).flops(SAMPLES)
    found = measure.row(case, f"HubertModel, {best}", times["ours"], times[best])
    return measure.with_flops(found, flops)


def rows(cases: Sequence[str] = tuple(CASES)) -> Iterator[dict[str, Any]]:
    """Yield the rows of `CASES`."""
    yield from map(row, cases)


if __name__ == "__main__":
    for each in rows(sys.argv[1:] or tuple(CASES)):
        print(each, flush=True)
