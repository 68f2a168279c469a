"""Rejection of updates that are not finite or whose gradient norm is far above the usual.

It runs inside the jitted step on numbers of the state: a resumed run decides as an unbroken one.
"""

import jax
import jax.numpy as jnp

from mert_jax.checkpoints.train_state import Guard

Array = jax.Array


def limit(guard: Guard, factor: float) -> Array:
    """Return the largest accepted gradient norm, `factor` times the running median.

    It is infinite until an eighth of the window is known, and if `factor` is 0.
    """
    window = guard.norms.shape[0]
    known = jnp.isfinite(guard.norms).sum()
    bound = factor * jnp.nanmedian(guard.norms)
    return jnp.where((known >= -(-window // 8)) & (factor > 0), bound, jnp.inf)


def accepts(guard: Guard, loss: Array, norm: Array, factor: float) -> Array:
    """Return True if an update with this loss and gradient norm may be made."""
    return jnp.isfinite(loss) & jnp.isfinite(norm) & (norm <= limit(guard, factor))


def after(guard: Guard, norm: Array, accepted: Array) -> Guard:
    """Return the guard after an update was made or, if not `accepted`, skipped."""
    norms = jnp.append(guard.norms[1:], norm.astype(guard.norms.dtype))
    skipped = jnp.where(accepted, 0, 1)
    return guard._replace(
        norms=jnp.where(accepted, norms, guard.norms),
        skipped=guard.skipped + skipped,
        streak=jnp.where(accepted, 0, guard.streak + 1),
    )
