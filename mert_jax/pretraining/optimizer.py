"""The official optimiser: warmup and linear decay, global clipping, Adam, decoupled decay."""

import jax
import jax.numpy as jnp
import optax

from mert_jax.checkpoints.train_state import AdamState


def warmup_linear_decay(peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Return the schedule that rises linearly to `peak` and falls linearly to 0.

    The first update has rate 0 and changes only the moments, as in fairseq.
    """

    def schedule(count):
        rising = count / max(warmup_steps, 1)
        falling = (total_steps - count) / max(total_steps - warmup_steps, 1)
        return peak * jnp.clip(jnp.where(count < warmup_steps, rising, falling), 0.0, 1.0)

    return schedule


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Return Adam with `eps` added to the square root *before* bias correction, unlike optax.

    Source: fairseq; Kingma and Ba, arXiv 1412.6980, end of section 2.
    """

    def init(params):
        mu, nu = jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params)
        return AdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, updates, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * jnp.square(g), updates, state.nu)
        # powers in the moments' precision: float32 would cost 1e-8 in a float64 run
        dtype = jnp.result_type(*jax.tree.leaves(mu))
        t = count.astype(dtype)
        correction = jnp.sqrt(1 - b2**t) / (1 - b1**t)
        updates = jax.tree.map(lambda m, v: correction * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scale gradients by min(1, max_norm / (norm + 1e-6)), as fairseq does."""

    def update(updates, state, params=None):
        del params
        scale = jnp.minimum(1, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: g * scale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def make(
    schedule: optax.Schedule, *, clip_norm: float, b1=0.9, b2=0.98, eps=1e-6, weight_decay=0.01
) -> optax.GradientTransformation:
    """Return the official chain: clip, Adam, and decay of every parameter, norms and biases too.

    Source: fairseq, `optim/adam.py`, with the numbers of MERT's configs.
    """
    return optax.chain(
        clip_by_global_norm(clip_norm),
        scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
