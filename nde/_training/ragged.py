"""Series of unequal length: a few lengths, so a few compiled shapes.

Padding all series to the longest wastes what the others are shorter by; a shape per series compiles
for ever. So the series are sorted by length into `buckets` groups of about equal number, each padded to
its own longest one by repeating the last row: a repeated last time is how `nde.losses.trajectory` and
the models of `nde` know that a series has ended. A batch is of one group; an epoch goes through all
batches of all groups in a new order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from nde._training.batching import ArrayBatches, ArrayRows, as_integer


@dataclass(frozen=True)
class Ragged:
    """Series of unequal length, as the `data` of `nde.fit`: a step is compiled for every bucket.

    Args:
        series: One PyTree of arrays per series, such as `(ts, ys)`; all its arrays have the length
            of the series as their first axis.
        buckets: Largest number of different lengths, of which `shapes` tells.

    Raises:
        ValueError: for series that differ in more than their length.
    """

    series: Sequence[PyTree]
    buckets: int = 4

    def __post_init__(self):
        buckets = as_integer(self.buckets)
        if buckets is None or buckets < 1:
            raise ValueError(f"`buckets` is {self.buckets!r}; it must be an integer >= 1.")
        if not isinstance(self.series, Sequence) or not self.series:
            raise ValueError(
                "`series` is a list of one or more PyTrees of arrays, such as (ts, ys)."
            )
        first = _described(self.series[0])
        for number, one in enumerate(self.series):
            lengths = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(one)}
            if len(lengths) != 1 or () in lengths or (0,) in lengths:
                raise ValueError(
                    f"`series[{number}]` has arrays of lengths {sorted(lengths)}; all arrays of one "
                    "series have its length as their first axis, 1 or more."
                )
            if _described(one) != first:
                raise ValueError(
                    f"`series[{number}]` has arrays {_described(one)} but `series[0]` has {first}; "
                    "only the lengths may differ."
                )

    @property
    def shapes(self) -> dict[int, int]:
        """Length to number of series, of every bucket."""
        return {length: len(numbers) for length, numbers in self._groups()}

    def _groups(self) -> list[tuple[int, np.ndarray]]:
        lengths = np.array([len(jax.tree.leaves(one)[0]) for one in self.series])
        order = np.argsort(lengths, kind="stable")
        groups: dict[int, list[np.ndarray]] = {}
        for numbers in np.array_split(order, min(int(self.buckets), len(order))):
            groups.setdefault(int(lengths[numbers[-1]]), []).append(numbers)
        return [(length, np.concatenate(numbers)) for length, numbers in groups.items()]

    def padded(self) -> list[tuple[np.ndarray, PyTree[np.ndarray]]]:
        """Of every bucket, the numbers of its series and the arrays, shape (series, length, ...)."""
        return [
            (
                numbers,
                jax.tree.map(
                    lambda *leaves, n=length: np.stack([_stretched(x, n) for x in leaves]),
                    *(self.series[i] for i in numbers),
                ),
            )
            for length, numbers in self._groups()
        ]


class RaggedBatches:
    """Batches of series of about the same length. Arguments as those of `ArrayBatches`."""

    takes_gaps = False

    def __init__(self, data: Ragged, batch_size: int | None, key: PRNGKeyArray, parts: int = 1):
        self.size = len(data.series)
        wanted = self.size if batch_size is None else as_integer(batch_size)
        if wanted is None or not 1 <= wanted <= self.size:
            raise ValueError(
                f"`batch_size` is {batch_size!r} but there are {self.size} series; give an integer "
                f"from 1 to {self.size}, or None for all of a bucket at every step."
            )
        self.key, self.numbers, self.buckets = jax.random.fold_in(key, 0), [], []
        for index, (numbers, arrays) in enumerate(data.padded()):
            size = min(wanted, len(numbers))
            self.numbers.append(numbers)
            self.buckets.append(
                ArrayBatches(arrays, size, jax.random.fold_in(key, index + 1), parts)
            )
        self.table = [(b, i) for b, one in enumerate(self.buckets) for i in range(one.batches)]
        self.batches = len(self.table)
        self._epoch, self._order = -1, np.zeros(0, int)

    def move(self, place: Callable) -> None:
        """Keep the arrays where `place` puts them."""
        for bucket in self.buckets:
            bucket.move(place)

    def rows(self, step: int) -> ArrayRows:
        """How the batch of `step` is cut out of its payload."""
        bucket, inner = self._find(step)
        return bucket.rows(inner)

    def payload(self, step: int) -> PyTree[Array]:
        """The arrays that `rows` makes the batch of `step` from."""
        bucket, inner = self._find(step)
        return bucket.payload(inner)

    def examples(self, step: int) -> list[int]:
        """Numbers of the series in the batch of `step`."""
        bucket, inner = self._find(step)
        numbers = self.numbers[self.buckets.index(bucket)]
        return [int(numbers[row]) for row in bucket.examples(inner)]

    def gaps_of(self, step: int) -> str:
        """Where the batch of `step` holds nan, for a report; empty where it does not."""
        bucket, inner = self._find(step)
        found = bucket.gaps_of(inner)
        return found and f"of the series of length {_length(bucket)}, {found}"

    def _find(self, step: int) -> tuple[ArrayBatches, int]:
        """The bucket of a step, and the step in the count of that bucket."""
        epoch, position = divmod(step, self.batches)
        if epoch != self._epoch:
            key = jax.random.fold_in(self.key, epoch)
            self._epoch = epoch
            self._order = np.asarray(jax.random.permutation(key, self.batches))
        number, place = self.table[self._order[position]]
        bucket = self.buckets[number]
        return bucket, epoch * bucket.batches + place


def _length(bucket: ArrayBatches) -> int:
    return jax.tree.leaves(bucket.data)[0].shape[1]


def _described(series: PyTree) -> Any:
    leaves, tree = jax.tree.flatten(series)
    return [f"{np.asarray(x).dtype}{list(np.shape(x)[1:])}" for x in leaves], tree


def _stretched(leaf: Any, length: int) -> np.ndarray:
    """`leaf` with its last row repeated."""
    leaf = np.asarray(leaf)
    return leaf[np.minimum(np.arange(length), len(leaf) - 1)]
