"""What a lane computes while it has no step of its own to pull back.

All lanes are pulled back together, so a lane whose solve failed evaluates something too, and a NaN met
there would reach the parameters it shares with others: zero times NaN is NaN. Such a lane copies the
inputs of a *donor*, a lane whose steps are known to be good, and contributes exactly nothing.

A constant that only failed lanes use is replaced by the donor's. One that a healthy lane uses too
cannot be, so its donor must share it. Under nested `vmap` that can be asked of one constant on part of
the levels (the largest, `Lanes.partial`); others on part of the levels are repeated for every lane
first (`Lanes.separated`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from nde.solvers import trees
from nde.solvers.lanes.batch import Lanes, Levels, masked


class Donors(NamedTuple):
    """Which lanes have a step of their own, and whom the others copy."""

    healthy: Bool[Array, " lanes"]
    source: Int[Array, " lanes"]  # itself, or its donor
    best: Int[Array, ""]  # the donor of a lane that shares no constant with a healthy one

    def copied(self, tree: PyTree[Array]) -> PyTree[Array]:
        """Lane-wise arrays, with the donor's in lanes that have no step."""
        return jax.tree.map(lambda x: x.at[self.source].get(mode="promise_in_bounds"), tree)

    def copied_consts(self, consts: list[Array], lanes: Lanes) -> list[Array]:
        """Constants, with the donor's where no lane with a step uses them."""
        pairs = zip(consts, lanes.levels, strict=True)
        return [self._copied_const(x, has, lanes) for x, has in pairs]

    def _copied_const(self, const: Array, has: Levels, lanes: Lanes) -> Array:
        """A constant on the levels `has`, with the donor's where no lane with a step uses it."""
        if not any(has):
            return const
        if all(has):
            flat = const.reshape((lanes.count, *const.shape[len(has) :]))
            return self.copied(flat).reshape(const.shape)
        others = tuple(i for i, h in enumerate(has) if not h)
        used = jnp.any(self.healthy.reshape(lanes.sizes), axis=others)
        place = jnp.unravel_index(self.best, lanes.sizes)
        theirs = const[tuple(p for p, h in zip(place, has, strict=True) if h)]
        return trees.where(used, const, theirs[(None,) * used.ndim])


def donors(steps: Int[Array, " lanes"], lanes: Lanes, consts: list[Array]) -> Donors:
    """A lane without a step copies the lane with most steps, preferring one with the same parameters."""
    best, own = jnp.argmax(steps), jnp.arange(lanes.count)
    shared = lanes.partial(consts)
    if shared is None:
        return Donors(steps > 0, jnp.where(steps > 0, own, best), best)
    axes = tuple(i for i, has in enumerate(shared) if not has)
    by_level, number = steps.reshape(lanes.sizes), own.reshape(lanes.sizes)
    most = jnp.max(by_level, axis=axes, keepdims=True)
    near = jnp.max(jnp.where(by_level == most, number, -1), axis=axes, keepdims=True)
    donor = jnp.broadcast_to(jnp.where(most > 0, near, best), lanes.sizes).reshape(-1)
    return Donors(steps > 0, jnp.where(steps > 0, own, donor), best)


def cleared(
    healthy: Bool[Array, " lanes"], totals: dict[int, Array], lanes: Lanes
) -> dict[int, Array]:
    """The cotangents of constants, with zeros for a constant that no healthy lane uses: what came of
    copied inputs is zero times a derivative, and so zero unless that is NaN.
    """
    out = {}
    for i, total in totals.items():
        apart = [k < lanes.outer or has for k, has in enumerate(lanes.levels[i])]
        others = tuple(k for k, own in enumerate(apart) if not own)
        used = jnp.any(healthy.reshape(lanes.sizes), axis=others)
        out[i] = masked(used, total) if any(apart) else total
    return out
