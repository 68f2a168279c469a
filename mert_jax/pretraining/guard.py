"""Which updates may be trusted: one that is not finite, or far out of line, changes nothing.

All of it runs inside the jitted step, on numbers that are in the state: a run that is stopped and
resumed judges as one that was not.
"""

import jax
import jax.numpy as jnp

from mert_jax.checkpoints.train_state import Guard

Array = jax.Array


def limit(guard: Guard, factor: float) -> Array:
    """The largest gradient norm that is accepted: `factor` times the running median; infinite until
    an eighth of the window is known, and where `factor` is 0."""
    window = guard.norms.shape[0]
    known = jnp.isfinite(guard.norms).sum()
    bound = factor * jnp.nanmedian(guard.norms)
    return jnp.where((known >= -(-window // 8)) & (factor > 0), bound, jnp.inf)


def accepts(guard: Guard, loss: Array, norm: Array, factor: float) -> Array:
    """Whether an update of this loss and gradient norm may be made, bool."""
    return jnp.isfinite(loss) & jnp.isfinite(norm) & (norm <= limit(guard, factor))


def after(guard: Guard, norm: Array, accepted: Array) -> Guard:
    """The guard once the update was made or, where it was not `accepted`, skipped."""
    norms = jnp.append(guard.norms[1:], norm.astype(guard.norms.dtype))
    skipped = jnp.where(accepted, 0, 1)
    return guard._replace(
        norms=jnp.where(accepted, norms, guard.norms),
        skipped=guard.skipped + skipped,
        streak=jnp.where(accepted, 0, guard.streak + 1),
    )
