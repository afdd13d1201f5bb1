"""Batches of one shape from data of any length.

Step k of an epoch takes entries k * batch_size, ... of that epoch's permutation of the examples.
The last batch of an epoch is filled up with copies of valid examples, which its mask leaves out:
every compiled shape is the same, and a copy is a real and cheap solve where a row of zeros or nan
would be neither. The permutation depends on the key and the epoch alone.
"""

import operator
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Int, PRNGKeyArray, PyTree

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

    Raises:
        ValueError: if `data` is not a PyTree of arrays of one length, and no mask is given.
    """

    data: PyTree[Any]
    mask: Bool[Array, " batch"]
    step: Int[Array, ""]

    def __init__(
        self,
        data: PyTree[Any],
        mask: Bool[Array, " batch"] | None = None,
        step: Int[ArrayLike, ""] = 0,
    ):
        self.data = data
        self.mask = jnp.ones(_check_examples(data), dtype=bool) if mask is None else mask
        self.step = jnp.asarray(step)


class ArrayBatches:
    """Batches from arrays that are in memory.

    `payload` runs on the host, `assemble` inside the compiled step.
    """

    takes_gaps = False  # whether the loss was once finite on a batch that holds nan

    def __init__(self, data: PyTree, batch_size: int | None, key: PRNGKeyArray):
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
        self._shuffle = jax.jit(self._order)
        self._epoch, self._permutation = -1, None

    def payload(self, step: int) -> PyTree[Array]:
        """The arrays that `assemble` makes the batch of `step` from."""
        if self.batch_size is None:
            return self.data
        epoch, position = divmod(step, self.batches)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, self._shuffle(np.int32(epoch))
        return self.data, self._permutation, np.int32(position)

    def assemble(self, payload: PyTree[Array]) -> tuple[PyTree[Array], Bool[Array, " batch"]]:
        """Data and mask of one batch."""
        if self.batch_size is None:
            return payload, jnp.ones(self.size, dtype=bool)
        data, order, position = payload
        start = position * self.batch_size
        rows = jax.lax.dynamic_slice(order, (start,), (self.batch_size,))
        mask = start + jnp.arange(self.batch_size, dtype=start.dtype) < self.size
        return jax.tree.map(lambda leaf: leaf[rows], data), mask

    def examples(self, step: int) -> list[int]:
        """Numbers of the examples in the batch of `step`, for a report."""
        if self.batch_size is None:
            return list(range(self.size))
        epoch, position = divmod(step, self.batches)
        order = np.asarray(self._shuffle(np.int32(epoch)))[: self.size]
        return order[position * self.batch_size : (position + 1) * self.batch_size].tolist()

    def gaps_of(self, step: int) -> str:
        """Where the batch of `step` holds nan, for a report; empty where it does not."""
        if not self.gaps or not any(
            set(rows) & set(self.examples(step)) for rows in self.gaps.values()
        ):
            return ""
        return _say_gaps(self.gaps, self.size)

    def _order(self, epoch: Int[Array, ""]) -> Int[Array, " padded"]:
        order = jax.random.permutation(jax.random.fold_in(self.key, epoch), self.size)
        return jnp.resize(order, (self.batches * (self.batch_size or self.size),))


class IteratorBatches:
    """Batches that the user makes: the first one sets the shape, a shorter one is filled up."""

    takes_gaps = False

    def __init__(self, batches: Iterator):
        self.iterator, self.size, self.arrays, self.taken = batches, None, None, 0
        self.gaps: dict[int, str] = {}  # of recent batches, by number

    def payload(self, step: int) -> PyTree[Array]:
        """The next batch, filled up to the size of the first, and its mask."""
        try:
            data = next(self.iterator)
        except StopIteration:
            raise ValueError(
                f"`data` is an iterator that ended after {self.taken} batches, before the last "
                "step; lower `steps`, or let it start again (itertools.cycle). The model so far is "
                "in `error.model`."
            ) from None
        length = _check_examples(data)
        # An array on a device is looked at once: the next batches should not wait for it.
        looked_at = eqx.filter(data, lambda x: self.taken == 0 or isinstance(x, np.ndarray))
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
        number = np.arange(self.size)
        # Indexed before jax sees them: jax reads NumPy memory later, and the iterator may refill it.
        data = jax.tree.map(lambda leaf: jnp.asarray(leaf[number % length]), data)
        arrays = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", data)
        self.arrays = arrays if self.arrays is None else self.arrays
        if jax.tree.flatten(arrays) != jax.tree.flatten(self.arrays):
            raise ValueError(
                f"`data` gave a batch of {arrays} after a first one of {self.arrays}; every batch "
                "has the same arrays. Pad series to one length: nde.paths.pad_series."
            )
        return data, number < length

    def assemble(self, payload: PyTree[Array]) -> tuple[PyTree[Array], Bool[Array, " batch"]]:
        """Data and mask of one batch."""
        return payload

    def examples(self, step: int) -> list[int]:
        """Unknown: the iterator does not number its examples."""
        return []

    def gaps_of(self, step: int) -> str:
        """Where the batch of `step` holds nan, for a report; empty where it does not. Asked once."""
        return self.gaps.pop(step, "")


def make_batches(
    data: Any, batch_size: int | None, key: PRNGKeyArray
) -> ArrayBatches | IteratorBatches:
    """The source of batches for `data`, a PyTree of arrays or an iterator."""
    if not isinstance(data, Iterator):
        return ArrayBatches(data, batch_size, key)
    if batch_size is not None:
        raise ValueError(
            f"`batch_size` is {batch_size} but `data` is an iterator, which makes its own batches; "
            "pass None."
        )
    return IteratorBatches(data)


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
