"""The validation splits, each in turn, the same every time."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mert_jax.pretraining import metrics
from mert_jax.pretraining.step import Sums


class Validation:
    """What `eval_step`, (params, batch) -> Sums, says of the `batches` of each dataset, which come
    anew with each call; `pat` is called for each of them."""

    def __init__(
        self,
        batches: Callable[[], Iterable[Iterator[Any]]],
        eval_step: Callable[[Any, Any], Sums],
        pat: Callable[[], None],
    ):
        self._batches, self._eval_step, self._pat = batches, eval_step, pat

    def _sums(self, params: Any) -> Iterator[Iterator[Sums]]:
        def of(dataset: Iterator[Any]) -> Iterator[Sums]:
            for batch in dataset:
                self._pat()
                yield self._eval_step(params, batch)

        return map(of, self._batches())

    def first(self, params: Any) -> list[Sums]:
        """The sums of the first batch of each dataset."""
        return [next(sums) for sums in self._sums(params)]

    def row(self, params: Any) -> dict[str, Any]:
        """The metrics of all records, as `metrics.validation` names them."""
        sums = [functools.reduce(metrics.add, sums, None) for sums in self._sums(params)]
        return metrics.validation(sums)
