"""Batches of one shape from data of any length.

Step k of an epoch takes entries k * batch_size, ... of that epoch's permutation of the examples.
The last batch of an epoch is filled up with copies of valid examples, which its mask leaves out:
every compiled shape is the same, and a copy is a real and cheap solve where a row of zeros or nan
would be neither. The permutation depends on the key and the epoch alone.

A source of batches has two halves. `payload` runs on the host and says what a step is handed; `rows`
is a small frozen record that cuts the batch out of it inside the compiled step. Where a batch is cut
into parts (over devices, or one after the other) it is filled up to a multiple of them.
"""

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, PRNGKeyArray, PyTree

from nde._training.history import NonFiniteError


class Batch(eqx.Module):
    """What a loss sees of the data at one step. `Batch(data)` is data to evaluate a loss on, all of
    which counts.

    Args:
        data: The user's PyTree; every leaf has shape (batch, ...).
        mask: Shape (batch,). False marks a copy that fills up the last batch of an epoch and must
            not count: a mean over examples is `sum(mask * loss) / sum(mask)`, as in
            `nde.losses.mse(..., mask=batch.mask)`. Without one every example counts.
        step: Number of the training step, from 0, shape (). For schedules inside the loss: a
            horizon, a weight.
        keys: One random key per example, shape (batch,): what a loss that draws something for every
            example should use, as they stay the same when the batch is divided over devices. `fit`
            gives `jax.random.split(key, batch)`; `None` in a batch that is made by hand.
        horizon: Of the `Stage`, shape (); `None` where no stage has one.
        weights: Of the `Stage`, by name, each of shape ().
        training: False in a validation.

    Raises:
        ValueError: if `data` is not a PyTree of arrays of one length, and no mask is given.
    """

    data: PyTree[Any]
    mask: Bool[Array, " batch"]
    step: Int[Array, ""]
    keys: Key[Array, " batch"] | None
    horizon: Float[Array, ""] | None
    weights: Mapping[str, Float[Array, ""]]
    training: bool = eqx.field(static=True)

    def __init__(
        self,
        data: PyTree[Any],
        mask: Bool[Array, " batch"] | None = None,
        step: Int[ArrayLike, ""] = 0,
        *,
        keys: Key[Array, " batch"] | None = None,
        horizon: Float[Array, ""] | None = None,
        weights: Mapping[str, Float[Array, ""]] | None = None,
        training: bool = True,
    ):
        self.data = data
        self.mask = jnp.ones(_check_examples(data), dtype=bool) if mask is None else mask
        self.step = jnp.asarray(step)
        self.keys = keys
        self.horizon = horizon
        self.weights = dict(weights or {})
        self.training = training

    def example_keys(self, key: PRNGKeyArray) -> Key[Array, " batch"]:
        """`keys`, or new ones made of `key` where there are none."""
        return jax.random.split(key, self.mask.shape[0]) if self.keys is None else self.keys


@dataclass(frozen=True)
class ArrayRows:
    """Cuts a batch out of all the data: `size` examples, `batch_size` at a time (None: all, in their
    own order), filled up to `padded`."""

    size: int
    batch_size: int | None
    padded: int
    divided = False  # every device is handed all of it

    def __call__(
        self, payload: PyTree[Array], part: Any, parts: int
    ) -> tuple[PyTree[Array], Array]:
        """Data and mask of one of `parts` equal parts of the batch."""
        if self.batch_size is None:
            data, start, length = payload, 0, self.size
            if parts == 1 and self.padded == self.size:
                return data, jnp.ones(self.size, dtype=bool)
        else:
            data, order, position = payload
            start, length = position * self.batch_size, self.batch_size
        share = self.padded // parts
        number = jnp.arange(share, dtype=jnp.int32) + jnp.int32(part * share)
        mask = (number < length) & (start + number < self.size)
        rows = number % self.size
        if self.batch_size is not None:
            rows = order[(start + number) % order.shape[0]]
        return jax.tree.map(lambda leaf: leaf[rows], data), mask


@dataclass(frozen=True)
class GivenRows:
    """A batch that comes as it is, with its mask: from an iterator."""

    padded: int
    divided = True  # every device is handed its part

    def __call__(
        self, payload: PyTree[Array], part: Any, parts: int
    ) -> tuple[PyTree[Array], Array]:
        """Data and mask, which are this part already."""
        return payload


class ArrayBatches:
    """Batches from arrays that are in memory.

    Args:
        data: Arrays with a leading example axis.
        batch_size: Examples of a batch; None for all of them at every step.
        key: Of the order.
        parts: What the number of rows of a batch is a multiple of.
    """

    takes_gaps = False  # whether the loss was once finite on a batch that holds nan

    def __init__(self, data: PyTree, batch_size: int | None, key: PRNGKeyArray, parts: int = 1):
        self.size = _check_examples(data)
        if batch_size is not None:
            batch_size, given = as_integer(batch_size), batch_size
            if batch_size is None or not 1 <= batch_size <= self.size:
                raise ValueError(
                    f"`batch_size` is {given!r} but the data has {self.size} examples; give an "
                    f"integer from 1 to {self.size}, or None for all of them at every step."
                )
        self.gaps = _find_gaps(data)
        self.data = jax.tree.map(jnp.asarray, data)
        self.batch_size, self.key = batch_size, key
        self.batches = 1 if batch_size is None else -(-self.size // batch_size)
        self._rows = ArrayRows(self.size, batch_size, _multiple(batch_size or self.size, parts))
        self._epoch, self._permutation = -1, None
        self._place: Callable = lambda tree: tree

    def move(self, place: Callable) -> None:
        """Keep the arrays where `place` puts them."""
        self.data, self._place = place(self.data), place
        self._epoch = -1

    def rows(self, step: int) -> ArrayRows:
        """How the batch of `step` is cut out of its payload."""
        return self._rows

    def payload(self, step: int) -> PyTree[Array]:
        """The arrays that `rows` makes the batch of `step` from."""
        if self.batch_size is None:
            return self.data
        epoch, position = divmod(step, self.batches)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, self._place(self._order(epoch))
        return self.data, self._permutation, np.int32(position)

    def examples(self, step: int) -> list[int]:
        """Numbers of the examples in the batch of `step`, for a report."""
        if self.batch_size is None:
            return list(range(self.size))
        epoch, position = divmod(step, self.batches)
        order = np.asarray(self._order(epoch))[: self.size]
        return order[position * self.batch_size : (position + 1) * self.batch_size].tolist()

    def gaps_of(self, step: int) -> str:
        """Where the batch of `step` holds nan, for a report; empty where it does not."""
        rows = {row for rows in self.gaps.values() for row in rows}
        if not rows or rows.isdisjoint(self.examples(step)):
            return ""
        return _say_gaps(self.gaps, self.size)

    def _order(self, epoch: int) -> Int[Array, " padded"]:
        return _shuffled(
            self.key, np.int32(epoch), self.size, self.batches * (self.batch_size or self.size)
        )


@functools.partial(jax.jit, static_argnums=(2, 3))
def _shuffled(key: PRNGKeyArray, epoch: Array, size: int, padded: int) -> Int[Array, " padded"]:
    """The order of one epoch, begun again where it is filled up."""
    return jnp.resize(jax.random.permutation(jax.random.fold_in(key, epoch), size), (padded,))


class IteratorBatches:
    """Batches that the user makes: the first one sets the shape, a shorter one is filled up."""

    takes_gaps = False

    def __init__(self, batches: Iterator, parts: int = 1):
        self.iterator, self.parts = batches, parts
        self.size: int | None = None
        self.arrays: Any = None
        self.taken = 0
        self.gaps: dict[int, str] = {}  # of recent batches, by number
        self._next: Any = None

    def rows(self, step: int) -> GivenRows:
        """How the batch of `step` is cut out of its payload."""
        if self.size is None:  # its shape is that of the first batch
            self._next = self._take(step)
        return GivenRows(_multiple(self.size or 1, self.parts))

    def move(self, place: Callable) -> None:
        """Nothing to move: every batch comes from the host."""

    def skip(self, batches: int) -> None:
        """Go past what a run that is continued has seen already."""
        for _ in range(batches):
            self._next_batch()
            self.taken += 1

    def payload(self, step: int) -> PyTree[Array]:
        """The next batch, filled up to the size of the first, and its mask."""
        if self._next is not None:
            taken, self._next = self._next, None
            return taken
        return self._take(step)

    def _next_batch(self) -> PyTree:
        try:
            return next(self.iterator)
        except StopIteration:
            raise ValueError(
                f"`data` is an iterator that ended after {self.taken} batches, before the last "
                "step; lower `steps`, or let it start again (itertools.cycle). The model so far is "
                "in `error.model`."
            ) from None

    def _take(self, step: int) -> PyTree[Array]:
        data = self._next_batch()
        length = _check_examples(data)
        # An array on a device is looked at once: the next batches should not wait for it.
        looked_at = eqx.filter(data, lambda x: self.size is None or isinstance(x, np.ndarray))
        gaps = _find_gaps(looked_at, f" of batch {self.taken}")
        if gaps:
            self.gaps[step] = _say_gaps(gaps, length)
        self.taken += 1
        self.size = length if self.size is None else self.size
        if length > self.size:
            raise ValueError(
                f"`data` gave a batch of {length} examples after a first one of {self.size}; "
                "no batch may be longer than the first."
            )
        number = np.arange(_multiple(self.size, self.parts))
        # Indexed before jax sees them: jax reads NumPy memory later, and the iterator may refill it.
        data = jax.tree.map(lambda leaf: jnp.asarray(leaf[number % length]), data)
        arrays = jax.tree.map(lambda leaf: f"{leaf.dtype}{[self.size, *leaf.shape[1:]]}", data)
        self.arrays = arrays if self.arrays is None else self.arrays
        if jax.tree.flatten(arrays) != jax.tree.flatten(self.arrays):
            raise ValueError(
                f"`data` gave a batch of {arrays} after a first one of {self.arrays}; every batch "
                "has the same arrays. Pad series to one length: nde.paths.pad_series, or give them "
                "as nde.train.Ragged."
            )
        return data, number < length

    def examples(self, step: int) -> list[int]:
        """Unknown: the iterator does not number its examples."""
        return []

    def gaps_of(self, step: int) -> str:
        """Where the batch of `step` holds nan, for a report; empty where it does not. Asked once."""
        return self.gaps.pop(step, "")


def _multiple(rows: int, parts: int) -> int:
    """`rows`, or as many more as make equal parts."""
    return -(-rows // parts) * parts


def as_integer(value: Any) -> int | None:
    """`value` as an int, be it of NumPy or JAX; None where it is no integer, such as True."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _check_examples(data: PyTree) -> int:
    """Number of examples: the common length of the leading axes."""
    leaves = jtu.tree_leaves_with_path(data)
    if not leaves:
        raise ValueError(
            "`data` holds no array; pass a PyTree of arrays with a leading example axis."
        )
    for path, leaf in leaves:
        if not eqx.is_array(leaf) or leaf.ndim == 0:
            raise ValueError(
                f"`data{jtu.keystr(path)}` is {leaf!r}; every leaf is an array with a leading "
                "example axis (one series alone: series[None]; lists: np.asarray(data); a loader of "
                "batches: iter(data))."
            )
        _check_numbers(f"data{jtu.keystr(path)}", leaf)
    lengths = {f"data{jtu.keystr(path)}": leaf.shape[0] for path, leaf in leaves}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"`data` has arrays of unequal length: {lengths}; give one row per example in each."
        )
    size = leaves[0][1].shape[0]
    if size == 0:
        raise ValueError(f"`data` has no examples: {lengths}; give at least one.")
    return size


def _find_gaps(data: PyTree, which: str = "") -> dict[str, list[int]]:
    """The examples that hold nan, by the name of the array. What is infinite is no data.

    A loss may take nan for what was not observed: whether this one does, its value tells.
    """
    gaps = {}
    for path, leaf in jtu.tree_leaves_with_path(data):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        name, values = f"`data{jtu.keystr(path)}`{which}", np.asarray(leaf)
        values = values.reshape(leaf.shape[0], -1)
        if np.isinf(values).any():
            examples = np.flatnonzero(np.isinf(values).any(axis=1)).tolist()
            raise NonFiniteError(
                f"{name} is infinite in {len(examples)} of {len(values)} examples: "
                f"{some(examples)}. Leave them out; a value that was not observed is nan for a "
                "loss that takes it, such as nde.losses.trajectory."
            )
        if np.isnan(values).any():
            gaps[name] = np.flatnonzero(np.isnan(values).any(axis=1)).tolist()
    return gaps


def _say_gaps(gaps: dict[str, list[int]], size: int) -> str:
    return "; ".join(
        f"{name} is nan in {len(rows)} of {size} examples: {some(rows)}"
        for name, rows in gaps.items()
    )


def _check_numbers(name: str, leaf: Any) -> None:
    """Raise if jax cannot hold the array, or would change its integers."""
    if not any(jnp.issubdtype(leaf.dtype, kind) for kind in (np.number, bool, jax.dtypes.extended)):
        raise ValueError(
            f"`{name}` has dtype {leaf.dtype}; give numbers: categories as integers, times as "
            "floats (days since the first)."
        )
    if not jnp.issubdtype(leaf.dtype, np.number):
        return
    kept = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if kept == leaf.dtype:
        return
    if jnp.issubdtype(leaf.dtype, np.integer) and (leaf.astype(kept) != leaf).any():
        raise ValueError(
            f"`{name}` has dtype {leaf.dtype} and runs from {leaf.min()} to {leaf.max()}, which does "
            f"not fit into {kept}; subtract an offset, or allow 64 bits: "
            'jax.config.update("jax_enable_x64", True).'
        )


def some(examples: list[int]) -> str:
    """The first few numbers of a list."""
    return f"{examples[:8]}{' and more' if len(examples) > 8 else ''}"
