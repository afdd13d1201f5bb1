"""What a lane computes while it has no step of its own to pull back.

All lanes are pulled back together, so a lane whose solve failed evaluates something too, and a NaN met
there would reach the parameters it shares with others: zero times NaN is NaN. Such a lane borrows a
step that is known to be good, with everything the step depends on, and contributes exactly nothing.

A constant that only failed lanes use is replaced by the donor's. One that a healthy lane uses too
cannot be, so its donor must share it. Under nested `vmap` that can be asked of one constant on part of
the levels (the largest, `_common`); others on part of the levels are repeated for every lane first.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from nde.solvers.adjoint.forward import choose, masked
from nde.solvers.lanes.primitives import Batch


class Donors(NamedTuple):
    """Which lanes have a step of their own, and whom the others borrow from."""

    healthy: Bool[Array, " lanes"]
    source: Int[Array, " lanes"]  # itself, or its donor
    best: Int[Array, ""]  # the donor of a lane that shares no constant with a healthy one

    def lend(self, tree: PyTree[Array]) -> PyTree[Array]:
        """Lane-wise arrays, with the donor's in lanes that have no step."""
        return _taken(self.source, tree)

    def lend_consts(self, consts: list[Array], batch: Batch) -> list[Array]:
        """Constants, with the donor's where no lane with a step uses them."""
        pairs = zip(consts, batch.levels, strict=False)
        return [self._lend_const(x, has, batch) for x, has in pairs]

    def _lend_const(self, const: Array, has: tuple[bool, ...], batch: Batch) -> Array:
        """A constant on the levels `has`, with the donor's where no lane with a step uses it."""
        if not any(has):
            return const
        if all(has):
            flat = const.reshape((batch.lanes, *const.shape[len(has) :]))
            return self.lend(flat).reshape(const.shape)
        others = tuple(i for i, h in enumerate(has) if not h)
        used = jnp.any(self.healthy.reshape(batch.sizes), axis=others)
        place = jnp.unravel_index(self.best, batch.sizes)
        theirs = const[tuple(p for p, h in zip(place, has, strict=True) if h)]
        return choose(used, const, theirs[(None,) * used.ndim])


def cleared(
    healthy: Bool[Array, " lanes"], totals: dict[int, Array], batch: Batch
) -> dict[int, Array]:
    """The cotangents of constants, with zeros where no healthy lane has a part in one: nothing is zero
    times what was borrowed, unless that is nan.
    """
    out = {}
    for i, total in totals.items():
        apart = [k < batch.outer or has for k, has in enumerate(batch.levels[i])]
        others = tuple(k for k, own in enumerate(apart) if not own)
        used = jnp.any(healthy.reshape(batch.sizes), axis=others)
        out[i] = masked(used, total) if any(apart) else total
    return out


def _taken(source: Int[Array, " lanes"], tree: PyTree[Array]) -> PyTree[Array]:
    return jax.tree.map(lambda x: x.at[source].get(mode="promise_in_bounds"), tree)


def donors(steps: Int[Array, " lanes"], batch: Batch, consts: list[Array]) -> Donors:
    """The donors of lanes that took no step: whoever took the most, next of kin first."""
    best, common, own = jnp.argmax(steps), _common(batch, consts), jnp.arange(batch.lanes)
    if common is None:
        return Donors(steps > 0, jnp.where(steps > 0, own, best), best)
    apart = tuple(i for i, h in enumerate(common) if not h)
    by_level, number = steps.reshape(batch.sizes), own.reshape(batch.sizes)
    most = jnp.max(by_level, axis=apart, keepdims=True)
    kin = jnp.max(jnp.where(by_level == most, number, -1), axis=apart, keepdims=True)
    donor = jnp.broadcast_to(jnp.where(most > 0, kin, best), batch.sizes).reshape(-1)
    return Donors(steps > 0, jnp.where(steps > 0, own, donor), best)


def separated(batch: Batch, consts: list[Array]) -> tuple[Batch, list[Array]]:
    """Repeats constants on part of the levels for every lane, unless they are on the common ones."""
    common, levels, out = _common(batch, consts), list(batch.levels), []
    for i, const in enumerate(consts):
        has = levels[i]
        if any(has) and not all(has) and has != common:
            const = batch.spread(const, has)
            const = const.reshape(batch.sizes + const.shape[1:])
            levels[i] = (True,) * len(has)
        out.append(const)
    return batch._replace(levels=tuple(levels)), out


def rejoined(batch: Batch, own: Batch, i: int, total: Array) -> Array:
    """The cotangent of constant i as it is on the levels of `batch`, from that on those of `own`."""
    if own.levels[i] == batch.levels[i]:
        return total
    flat = total.reshape((batch.lanes, *total.shape[len(batch.sizes) :]))
    return batch.gather(flat, batch.levels[i])


def _common(batch: Batch, consts: list[Array]) -> tuple[bool, ...] | None:
    """The levels of the largest constant that is on some but not all of them."""
    partial = [
        (const.size, has)
        for const, has in zip(consts, batch.levels, strict=False)
        if any(has) and not all(has)
    ]
    return max(partial)[1] if partial else None
