"""The validation splits, each in turn, the same every time."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mert_jax import data, faults, metrics
from mert_jax.step import Sums


class Validation:
    """What `eval_step`, (params, batch) -> Sums, says of the `sources`, one a dataset.

    put: a batch of the stream -> one on the devices; pat: called for each batch; max_faulty: the
    share of clips that may be replaced; clips: what `data.validation_batches` takes.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        eval_step: Callable[[Any, Any], Sums],
        put: Callable[[Any], Any],
        pat: Callable[[], None],
        max_faulty: float,
        **clips: Any,
    ):
        self._sources = [(s, faults.Faults(None, [s], max_faulty)) for s in sources]
        self._eval_step, self._put, self._pat, self._clips = eval_step, put, pat, clips

    def _sums(self, params: Any, source: Any, replaced: faults.Faults) -> Iterator[Sums]:
        batches = faults.noted(data.validation_batches(source, **self._clips), replaced)
        for batch in data.prefetch(batches, self._put):
            self._pat()
            yield self._eval_step(params, batch)

    def first(self, params: Any) -> list[Sums]:
        """The sums of the first batch of each source."""
        return [next(self._sums(params, *source)) for source in self._sources]

    def row(self, params: Any) -> dict[str, Any]:
        """The metrics of all records, as `metrics.validation` names them."""
        sums = [functools.reduce(metrics.add, self._sums(params, *s), None) for s in self._sources]
        return metrics.validation(sums)
