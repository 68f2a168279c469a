"""The student against transformers' Hubert: the same weights and clips of 5 s in float32, forward,
and forward with backward (of the mean square of the last hidden state).

Rows `student_SIZE_forward_bB` and `student_SIZE_backward_bB`; the peer is the faster one of torch's
eager mode and torch.compile. Without dropout on either side.

python -m tests.benchmarks.student [NAME ...]
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mert_jax.cli import UserError
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
        *(("330m", "forward", 1), ("330m", "forward", 4)),
    )
}
MODES = ("eager", "compiled")
SAMPLES = 120_000
CASE = "MERT_JAX_BENCHMARK_CASE"  # a variable: processes measured for memory inherit it


def names(size: str) -> list[str]:
    """The cases of a size."""
    return [case for case, (of, _, _) in CASES.items() if of == size]


# the libraries are imported where they are used: a process measured for memory has its own only
@functools.cache
def _config(size: str) -> Any:
    from transformers import HubertConfig

    width = SIZES[size]["hidden_size"]
    # MERT's configs: both sizes norm the first convolution over time
    options = dict(intermediate_size=4 * width, do_stable_layer_norm=size == "330m")
    return HubertConfig(**SIZES[size], **options)


def _peer(size: str) -> Any:
    import torch
    from transformers import HubertModel

    torch.set_num_threads(measure.THREADS)
    torch.manual_seed(0)
    return HubertModel(_config(size)).eval()


def _ours(case: str, state: dict[str, np.ndarray] | None = None) -> Callable[[], Any]:
    """A call of ours: the last hidden state, or the gradients; with the peer's weights or any."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from mert_jax.formats import huggingface
    from mert_jax.formats.names import params_from_hf

    size, backward, clips = CASES[case]
    options = dict(SIZES[size], intermediate_size=4 * SIZES[size]["hidden_size"])
    student = huggingface.student(options | {"do_stable_layer_norm": size == "330m"})
    if state is None:
        init = lambda: nn.unbox(student.init(jax.random.key(0), jnp.zeros((1, 4_000)))["params"])
        params = jax.jit(init)()
    else:
        params = jax.device_put(params_from_hf(state, student))
    wave = jax.device_put(music(clips, SAMPLES))
    last = lambda params, wave: student.apply({"params": params}, wave).last_hidden_state
    loss = lambda params, wave: jnp.square(last(params, wave)).mean()
    call = jax.jit(jax.grad(loss) if backward else last)
    return lambda: jax.block_until_ready(call(params, wave))


def _transformers(case: str, mode: str, model: Any) -> Callable[[], Any]:
    """A call of the peer: the last hidden state, or nothing, with gradients on its parameters."""
    import torch

    _, backward, clips = CASES[case]
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
    """How far the two sides' results are apart: the greatest difference, or that of the gradients
    as a share of their norm."""
    if not CASES[case][1]:
        return float(np.abs(np.asarray(ours) - theirs).max())
    import jax

    from mert_jax.formats import huggingface
    from mert_jax.formats.names import params_from_hf

    student = huggingface.student(model.config.to_dict())
    zero = lambda p: p.detach() * 0  # of what no loss reaches: the mask's embedding
    gradients = {n: (zero(p) if p.grad is None else p.grad) for n, p in model.named_parameters()}
    theirs = params_from_hf({n: x.numpy() for n, x in gradients.items()}, student)
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    return measure.relative_l2(flat(ours), flat(theirs))


def run_case() -> None:
    """What a peak of memory is measured of."""
    case, side = os.environ[CASE].split()
    if side == "ours":
        _ours(case)()
    else:
        _transformers(case, side, _peer(CASES[case][0]))()


def _peak(case: str, side: str) -> float:
    os.environ[CASE] = f"{case} {side}"
    return measure.peak_mib(run_case)


def row(case: str) -> dict[str, Any]:
    """One row; UserError where the two sides differ by more than 1e-3."""
    try:
        model = _peer(CASES[case][0])
    except ImportError as e:
        raise UserError(f"{case}: {e}; pip install mert_jax[peers]") from e
    ours = _ours(case, {name: x.numpy() for name, x in model.state_dict().items()})
    peers = {mode: _transformers(case, mode, model) for mode in MODES}
    error = _error(case, ours(), peers["eager"](), model)
    if error > 1e-3:
        raise UserError(f"{case}: {error:.1e} from transformers'")
    repeats = 3 if case.startswith("student_330m") else 5
    seconds = measure.interleaved({"ours": ours, **peers}, repeats)
    best = min(MODES, key=lambda mode: np.median(seconds[mode]))
    mib = _peak(case, "ours"), _peak(case, best)
    return measure.row(case, f"HubertModel, {best}", seconds["ours"], seconds[best], mib)


def rows(cases: Sequence[str] = tuple(CASES)) -> Iterator[dict[str, Any]]:
    """The rows of `CASES`, each as soon as it is there."""
    yield from map(row, cases)


if __name__ == "__main__":
    for each in rows(sys.argv[1:] or tuple(CASES)):
        print(each, flush=True)
