"""Batches of one shape from data of any length.

Step k of an epoch takes entries k * batch_size, ... of that epoch's permutation of the examples.
The last batch of an epoch is filled up with copies of valid examples, which its mask leaves out:
every compiled shape is the same, and a copy is a real and cheap solve where a row of zeros or nan
would be neither. The permutation depends on the key and the epoch alone.
"""

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from nde._times import check_spacing
from nde._training.history import NonFiniteError


class Batch(NamedTuple):
    """What a loss sees of the data at one step.

    Args:
        data: The user's PyTree; every leaf has shape (batch, ...).
        mask: Shape (batch,). False marks a copy that fills up the last batch of an epoch and must
            not count: a mean over examples is `sum(mask * loss) / sum(mask)`, as in
            `nde.losses.mse(..., mask=batch.mask)`.
        step: Number of the training step, from 0, shape (). For schedules inside the loss: a
            horizon, a weight.
    """

    data: PyTree[Any]
    mask: Bool[Array, " batch"]
    step: Int[Array, ""]


class ArrayBatches:
    """Batches from arrays that are in memory.

    `payload` runs on the host, `assemble` inside the compiled step.
    """

    def __init__(self, data: PyTree, batch_size: int | None, key: PRNGKeyArray):
        self.size = _check_examples(data)
        if batch_size is not None:
            batch_size, given = as_integer(batch_size), batch_size
            if batch_size is None or not 1 <= batch_size <= self.size:
                raise ValueError(
                    f"`batch_size` is {given!r} but the data has {self.size} examples; give an "
                    f"integer from 1 to {self.size}, or None for all of them at every step."
                )
        _check_finite(data)
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

    def _order(self, epoch: Int[Array, ""]) -> Int[Array, " padded"]:
        order = jax.random.permutation(jax.random.fold_in(self.key, epoch), self.size)
        return jnp.resize(order, (self.batches * (self.batch_size or self.size),))


class IteratorBatches:
    """Batches that the user makes: the first one sets the shape, a shorter one is filled up."""

    def __init__(self, batches: Iterator):
        self.iterator, self.size, self.arrays, self.taken = batches, None, None, 0

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
        _check_finite(looked_at, f" of batch {self.taken}")
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


def _check_finite(data: PyTree, which: str = "") -> None:
    """Raise if an array of the data holds nan or inf, with its path and the examples that do."""
    for path, leaf in jtu.tree_leaves_with_path(data):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        bad = ~np.isfinite(np.asarray(leaf)).reshape(leaf.shape[0], -1).all(axis=1)
        if bad.any():
            examples = np.flatnonzero(bad).tolist()
            raise NonFiniteError(
                f"`data{jtu.keystr(path)}`{which} is not finite in {len(examples)} of {bad.size} "
                f"examples: {some(examples)}. Leave them out, or fill them in and pass a mask as "
                "another array of the data, for the loss to leave them out: (ts, ys, mask) with "
                "nde.losses.trajectory."
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
    if _look_like_times(leaf):
        check_spacing(name, leaf)
    if jnp.issubdtype(leaf.dtype, np.integer) and (leaf.astype(kept) != leaf).any():
        raise ValueError(
            f"`{name}` has dtype {leaf.dtype} and runs from {leaf.min()} to {leaf.max()}, which does "
            f"not fit into {kept}; subtract an offset, or allow 64 bits: "
            'jax.config.update("jax_enable_x64", True).'
        )


def _look_like_times(leaf: Any) -> bool:
    """Whether NumPy has them, in rows that do not turn."""
    if not isinstance(leaf, np.ndarray) or leaf.ndim != 2 or leaf.shape[1] < 3:
        return False
    if not np.issubdtype(leaf.dtype, np.floating):
        return False
    steps = np.diff(leaf)
    return bool(((steps >= 0).all(axis=1) | (steps <= 0).all(axis=1)).all())


def some(examples: list[int]) -> str:
    """The first few numbers of a list."""
    return f"{examples[:8]}{' and more' if len(examples) > 8 else ''}"
