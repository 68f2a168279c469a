"""Matrix products of XLA and torch in float32, which bound the student and the step on a CPU.

Rows `product_NAME`, with FLOPs per second: the feed-forward layer of the 95M student for 4 clips of
5 s, and a large square product, the fastest case of a library on the machine.

python -m tests.benchmarks.product
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from mert_jax.errors import UserError
from tests.benchmarks import measure

SIZES = {"feed_forward": (4 * 374, 768, 3072), "square": (4096, 4096, 4096)}


def _factors(name: str) -> list[np.ndarray]:
    rows, inner, columns = SIZES[name]
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype("f") for shape in ((rows, inner), (inner, columns))]


# each side's process imports its own libraries only
def ours(name: str) -> Callable[[], Any]:
    """Build a product with XLA."""
    import jax

    a, b = jax.device_put(_factors(name))
    call = jax.jit(lambda a, b: a @ b)
    return lambda: jax.block_until_ready(call(a, b))


def peer(name: str) -> Callable[[], Any]:
    """Build a product with torch."""
    import torch

    torch.set_num_threads(measure.THREADS)
    a, b = map(torch.tensor, _factors(name))
    return lambda: a @ b


def rows() -> list[dict[str, Any]]:
    """The rows of `SIZES`: seconds for one product; UserError where the two differ."""
    found = []
    for name, size in SIZES.items():
        try:
            error = measure.relative_l2(np.asarray(ours(name)()), peer(name)().numpy())
        except ImportError as e:
            raise UserError(f"product: {e}; pip install mert_jax[peers]") from e
        if error > 1e-5:
            raise UserError(f"product_{name}: {error:.1e} from torch's")
        times = measure.apart({"ours": (ours, name), "peer": (peer, name)})
        row = measure.row(f"product_{name}", "torch", times["ours"], times["peer"])
        found.append(measure.with_flops(row, 2 * float(np.prod(size))))
    return found


if __name__ == "__main__":
    for row in rows():
        print(row)
