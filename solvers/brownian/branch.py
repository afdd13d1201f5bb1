r"""A walk in a binary tree of bridges that remembers the branch it stands on.

The root is the whole interval, of length 1 here. Node (l, j), 0 <= j < 2^l, is [j, j + 1] 2^-l; its
bridge is drawn with the key fold_in(key, 2^l + j), so every node is a function of the key and of
its place alone. A place is a leaf number in 0..2^depth and a fraction of that leaf; a leaf is cut
once, at that fraction.

Standing at a place p means holding, for every node with p strictly inside, its two halves. Of two
places, the nodes inside which both lie are a prefix of either branch: to go from one to the other,
redo the rest.

    [s, t]  =  right halves along the branch of s  +  left halves along the branch of t     (inside [s, t])

With p = 2^e (odd), the branch of p has depth - e nodes: a time with few significant bits is found
high up.

In code:    row l + 1 of `halves` -> both halves of the node at level l on the branch; row 0 -> the root
            levels(p) -> number of nodes on the branch of p; shared(p, q) -> length of the prefix
Lanes:      under `vmap` the loops run over the levels that any lane needs, so that the level, and
            the row written, is one number for all lanes: a row is written in place, not scattered.
Reference:  Efficient and accurate gradients for neural SDEs (2021) | arXiv:2105.13493
            Single-seed generation of Brownian paths and integrals (2024) | arXiv:2405.06464
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from nde.solvers import trees
from nde.solvers.brownian import bridge, threefry

MAX_DEPTH = 30  # node numbers are 32-bit integers


class Place(NamedTuple):
    """A point of [0, 1]: leaf number in 0..2^depth, and the fraction of that leaf (0: its left end)."""

    leaf: Int[Array, ""]
    fraction: Float[Array, ""]


class Halves(NamedTuple):
    """(W,) or (W, H) of the left and of the right half of a node; or of many, one row a level."""

    left: bridge.Node
    right: bridge.Node

    def side(self, right: Bool[Array, ""]) -> bridge.Node:
        """One of the two."""
        return trees.where(right, self.right, self.left)

    def row(self, level: ArrayLike) -> "Halves":
        """Those of one level."""
        return jax.tree.map(lambda x: x[level], self)


class Branch(eqx.Module):
    """What a walk remembers: where it stands and the nodes above. A cache: it changes the cost, not
    the result.

    Args:
        place: Where the walk stands.
        halves: Of each node above; arrays of shape (levels, size).
        draws: Normal draws made so far, each with as many numbers as a node.
    """

    place: Place
    halves: Halves
    draws: Int[Array, ""]


class Tree(NamedTuple):
    """The tree of one path.

    Args:
        key: Its random key (a scalar).
        depth: Number of levels above the leaves, at most `MAX_DEPTH`.
        parts: 1 for W alone, 2 for W and H.
    """

    key: PRNGKeyArray
    depth: Int[Array, ""]
    parts: int

    def plant(self, rows: int, size: int, dtype: Any) -> Branch:
        """A branch that stands at 0 and knows the root, W ~ N(0, 1), H ~ N(0, 1/12), shape (size,)."""
        w, *area = self._draw(jnp.int32(0), size, dtype)
        root = (w, *(x * 12**-0.5 for x in area))
        start = Place(jnp.int32(0), jnp.zeros((), dtype))
        # One array for each half and part: XLA runs a loop over small arrays in one thread, which
        # for a single path saves most of the time.
        stack = tuple(jnp.zeros((rows, size), dtype).at[0].set(x) for x in root)
        return Branch(start, Halves(stack, stack), jnp.int32(1))

    def increment(self, s: Place, t: Place, branch: Branch) -> tuple[bridge.Piece, Branch]:
        """The stretch from s to t, s <= t, and the branch, now standing on the end it was far from."""
        zero = bridge.opaque_zero(self.key, s.leaf, t.leaf)
        cost_s, cost_t = (self._levels(p) - self._shared(branch.place, p) for p in (s, t))
        from_t = cost_t < cost_s
        near, far = trees.where(from_t, t, s), trees.where(from_t, s, t)
        branch, _ = self._walk(branch, near, far, from_t, zero)
        branch, near_part = self._collect(branch, far, from_t, zero)
        near_part = trees.where(self._everything(s, t), self._root(branch.halves, zero), near_part)
        branch, far_part = self._walk(branch, far, near, ~from_t, zero)
        first, second = (
            trees.where(from_t, far_part, near_part),
            trees.where(from_t, near_part, far_part),
        )
        return bridge.join(first, second, zero), branch

    def _everything(self, s: Place, t: Place) -> Bool[Array, ""]:
        """Whether [s, t] is the root, which is half of no node and on no branch."""
        return (s.leaf == 0) & (s.fraction == 0) & (t.leaf == jnp.int32(1) << self.depth)

    def _root(self, halves: Halves, zero) -> bridge.Piece:
        root = halves.row(0).left
        return bridge.piece(root, jnp.ones((), root[0].dtype), zero)

    def _draw(self, number: Int[Array, ""], size: int, dtype) -> bridge.Node:
        """The normals of a node."""
        key = threefry.fold_in(self.key, number)
        return tuple(jnp.split(threefry.normal(key, (self.parts * size,), dtype), self.parts))

    def _levels(self, p: Place) -> Int[Array, ""]:
        """Number of nodes with p strictly inside."""
        trailing_zeros = jax.lax.population_count((p.leaf & -p.leaf) - 1)
        return jnp.where(
            p.fraction > 0, self.depth + 1, jnp.maximum(self.depth - trailing_zeros, 0)
        )

    def _shared(self, p: Place, q: Place) -> Int[Array, ""]:
        """Number of nodes with both p and q strictly inside, cut at the same point."""
        prefix = self.depth + 1 - (32 - jax.lax.clz(p.leaf ^ q.leaf))
        one_cut = p.fraction == q.fraction
        prefix = jnp.where(one_cut, prefix, jnp.minimum(prefix, self.depth))
        return jnp.minimum(prefix, jnp.minimum(self._levels(p), self._levels(q)))

    def _ancestor(self, p: Place, level) -> Int[Array, ""]:
        """j of the node (level, j) to the right of p, or around it."""
        return p.leaf >> jnp.maximum(self.depth - level, 0)

    def _walk(self, branch: Branch, p: Place, other: Place, right_end, zero):
        """Moves to p; also the stretch between p and `other` that lies on the new part of the branch."""
        first, last = self._shared(branch.place, p), self._levels(p)

        def turn(carry):
            level, rows, draws, part = carry
            width, cut = self._cut(p, level)
            node = rows.row(level).side(self._ancestor(p, level) & 1 == 1)
            number = (jnp.int32(1) << level) + self._ancestor(p, level)
            noise, weights = bridge.materialized(
                level >= 0,
                lambda: (
                    self._draw(number, node[0].size, node[0].dtype),
                    bridge.coefficients(cut, width, self.parts),
                ),
            )
            halves = bridge.materialized(
                level >= 0, lambda: Halves(*bridge.split(node, weights, noise, zero))
            )
            here = (first <= level) & (level < last)
            # `new` from `halves`, not from the row: reading what is overwritten makes XLA copy all rows.
            new = self._half(halves, p, other, level, right_end, zero)
            part = trees.where(here, _extend(part, new, right_end, zero), part)
            kept = trees.where(here, halves, rows.row(level + 1))
            rows = jax.tree.map(lambda rows, x: rows.at[level + 1].set(x), rows, kept)
            return level + 1, rows, draws + 1, part

        # A lane with nothing to do must not make the others start from its level.
        start = _lowest(jnp.where(first < last, first, MAX_DEPTH + 1))
        stop = _highest(last)
        carry = (start, branch.halves, branch.draws, self._nothing(branch.halves))
        carry = jax.lax.while_loop(lambda carry: carry[0] < stop, turn, carry)
        _, rows, draws, part = carry
        return Branch(p, rows, draws), part

    def _collect(self, branch: Branch, other: Place, right_end, zero):
        """The stretch between the place stood on and `other` that lies on the branch: nothing is drawn."""
        p = branch.place
        first, last = self._shared(p, other), self._levels(p)

        def turn(carry):
            level, rows, part = carry
            new = self._half(rows.row(level + 1), p, other, level, right_end, zero)
            here = (first <= level) & (level < last)
            return level + 1, rows, trees.where(here, _extend(part, new, right_end, zero), part)

        # The rows go through the loop unchanged, so that one buffer serves this loop and the next.
        start = _lowest(jnp.where(first < last, first, MAX_DEPTH + 1))
        stop = _highest(last)
        carry = (start, branch.halves, self._nothing(branch.halves))
        _, rows, part = jax.lax.while_loop(lambda carry: carry[0] < stop, turn, carry)
        return Branch(p, rows, branch.draws), part

    def _cut(self, p: Place, level):
        """Length and cut of the node at `level` on the branch of p."""
        width = jnp.exp2(-level.astype(p.fraction.dtype))
        return width, jnp.where(level == self.depth, p.fraction, jnp.asarray(0.5, width.dtype))

    def _nothing(self, halves: Halves) -> bridge.Piece:
        zeros = jax.tree.map(lambda rows: jnp.zeros_like(rows[0]), halves.left)
        return bridge.Piece(jnp.zeros((), zeros[0].dtype), zeros)

    def _half(self, halves: Halves, p: Place, other: Place, level, right_end, zero) -> bridge.Piece:
        """The half of the node at `level` that lies between p and `other`, or nothing.

        p is the right end of the stretch if `right_end`, and then its left halves count, else its
        right ones.
        """
        # Of the deepest node on the branch p is the cut itself, so that the half on either side will do.
        inner = self._ancestor(p, level + 1) & 1
        touches = (level == self._levels(p) - 1) | ((inner == 1) == right_end)
        node = self._ancestor(p, level)
        scale = jnp.maximum(self.depth - level, 0)
        start, end = node << scale, (node + 1) << scale
        other_ceiling = other.leaf + (other.fraction > 0).astype(jnp.int32)
        inside = jnp.where(right_end, start >= other_ceiling, end <= other.leaf)
        width, cut = self._cut(p, level)
        width = width * jnp.where(right_end, cut, 1 - cut)
        new = bridge.piece(halves.side(~right_end), width, zero)
        return trees.where(touches & inside, new, trees.zeros_like(new))


def _extend(part: bridge.Piece, new: bridge.Piece, right_end, zero) -> bridge.Piece:
    """Deeper nodes lie nearer to the place stood on: later in time if that is the right end."""
    first, second = trees.where(right_end, part, new), trees.where(right_end, new, part)
    return bridge.join(first, second, zero)


def _over_lanes(reduce):
    """A function equal to the identity, and under `vmap` to `reduce` over the lanes: one number for all."""

    @jax.custom_batching.custom_vmap
    def over_lanes(x):
        return x

    @over_lanes.def_vmap
    def _(axis_size, in_batched, x):
        del axis_size, in_batched
        return over_lanes(reduce(x, axis=0)), False

    return over_lanes


_lowest, _highest = _over_lanes(jnp.min), _over_lanes(jnp.max)
