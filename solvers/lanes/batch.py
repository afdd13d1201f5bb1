"""Many trajectories as lanes of one computation: how their arrays are laid out.

A *lane* is one trajectory. *Levels* are the axes that `vmap` has added, outermost first; `sizes` are
their lengths. A constant, as a parameter of the vector field, has the axes of those levels only on
which it differs. All else belongs to a lane, and has one flat lane axis: in front, or behind the row
axis of an array that is written row by row.

Levels added before differentiation (`grad(vmap(f))`) share one cotangent per constant that they share.
Levels added after it (`vmap(grad(f))`) are the first `outer` ones; there every lane keeps its own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from nde.solvers import trees
from nde.solvers._compat import ShapedArray

Levels = tuple[bool, ...]  # on which levels an array differs


@dataclass(frozen=True)
class LaneShape:
    """The shape of an array in one lane; a leaf of a pytree."""

    shape: tuple[int, ...]
    dtype: Any
    rowed: bool = False  # the first axis is a row axis, and the lanes come after it
    differentiable: bool = False
    timed: bool = False  # differentiable only by what times depend on

    @property
    def axis(self) -> int:
        """Where the lanes, or their levels, are."""
        return int(self.rowed)

    def aval(self, sizes: tuple[int, ...]) -> Any:
        """The abstract value with axes of these sizes in the place of the lanes."""
        return ShapedArray(self.shape[: self.axis] + sizes + self.shape[self.axis :], self.dtype)

    def blank(self, lanes: int) -> Array:
        """Zeros in all lanes."""
        aval = self.aval((lanes,))
        return jnp.zeros(aval.shape, aval.dtype)

    def reshape(self, x: Array, sizes: tuple[int, ...]) -> Array:
        """From one flat lane axis to levels, or back."""
        return x.reshape(self.aval(sizes).shape)


def lane_shapes(
    tree: PyTree[Any], rowed: bool = False, differentiable: bool = False, timed: bool = False
) -> PyTree[LaneShape]:
    """The shapes in one lane of arrays that were computed with a flat lane axis."""

    def shape(x: Any) -> LaneShape:
        axis = int(rowed)
        inexact = jnp.issubdtype(x.dtype, jnp.inexact)
        one = x.shape[:axis] + x.shape[axis + 1 :]
        return LaneShape(one, x.dtype, rowed, differentiable and inexact, timed and inexact)

    return jax.tree.map(shape, tree)


class Lanes(NamedTuple):
    """Which levels there are, and which constant differs on which."""

    sizes: tuple[int, ...]
    levels: tuple[Levels, ...]  # of the constants, in order
    outer: int = 0

    @property
    def count(self) -> int:
        """The number of trajectories."""
        return math.prod(self.sizes)

    def along(self, count: int) -> "Lanes":
        """With one inner level more, of `count`, on which no constant differs."""
        insert = lambda t, new: (*t[: self.outer], new, *t[self.outer :])
        levels = tuple(insert(has, False) for has in self.levels)
        return Lanes(insert(self.sizes, count), levels, self.outer)

    def spread(self, x: Array, levels: Levels) -> Array:
        """An array with one flat lane axis in front, repeated over the levels it lacks."""
        shape = x.shape[sum(levels) :]
        own = iter(x.shape)
        full = tuple(next(own) if has else 1 for has in levels) + shape
        x = jnp.broadcast_to(x.reshape(full), self.sizes + shape)
        return x.reshape((self.count, *shape))

    def gather(self, cotangent: Array, levels: Levels) -> Array:
        """The transpose of `spread`, except over the outer levels, which stay apart."""
        shape = cotangent.shape[1:]
        cotangent = cotangent.reshape(self.sizes + shape)
        shared = tuple(i for i in range(self.outer, len(self.sizes)) if not levels[i])
        return jnp.sum(cotangent, axis=shared) if shared else cotangent

    def filled(self, shapes: PyTree[LaneShape], cts: PyTree) -> PyTree[Array]:
        """Cotangents with zeros where one is None; still None where there can be none."""

        def fill(shape: LaneShape, ct: Array | None) -> Array | None:
            return shape.blank(self.count) if ct is None and shape.differentiable else ct

        return jax.tree.map(fill, shapes, cts)

    def zeros(self, consts: Sequence[Array], i: int) -> Array:
        """The cotangent of constant i to begin with."""
        own = consts[i].shape[sum(self.levels[i][: self.outer]) :]
        return jnp.zeros(self.sizes[: self.outer] + own, consts[i].dtype)

    def partial(self, consts: Sequence[Array]) -> Levels | None:
        """The levels of the largest constant that differs on some but not all of them."""
        pairs = zip(consts, self.levels, strict=True)
        found = [(const.size, has) for const, has in pairs if any(has) and not all(has)]
        return max(found)[1] if found else None

    def separated(self, consts: Sequence[Array]) -> tuple["Lanes", list[Array]]:
        """Repeats in every lane the constants on part of the levels, unless these are the part on
        which the largest one is (see `donors`)."""
        kept, levels, out = self.partial(consts), [], []
        for const, has in zip(consts, self.levels, strict=True):
            if any(has) and not all(has) and has != kept:
                spread = self.spread(const, has)
                const, has = spread.reshape(self.sizes + spread.shape[1:]), (True,) * len(has)
            levels.append(has)
            out.append(const)
        return self._replace(levels=tuple(levels)), out

    def rejoined(self, separated: "Lanes", i: int, cotangent: Array) -> Array:
        """The cotangent of constant i, from that of the one that `separated` has made of it."""
        if separated.levels[i] == self.levels[i]:
            return cotangent
        flat = cotangent.reshape((self.count, *cotangent.shape[len(self.sizes) :]))
        return self.gather(flat, self.levels[i])

    def per_lane(self, fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """`fn(consts, *args)` for one lane -> the same for all, `args` having a flat lane axis."""
        return self._over(fn, 0, len(self.sizes))

    def _axes(self, level: int) -> list[int | None]:
        return [0 if has[level] else None for has in self.levels]

    def _over(self, fn: Callable[..., PyTree], first: int, last: int) -> Callable[..., PyTree]:
        sizes = self.sizes[first:last]

        def batched(consts: list[Array], *args: PyTree) -> PyTree:
            f = fn
            for i in reversed(range(first, last)):
                f = jax.vmap(f, in_axes=(self._axes(i),) + (0,) * len(args))
            out = f(consts, *jax.tree.map(lambda x: x.reshape(sizes + x.shape[1:]), args))
            count = math.prod(sizes)
            return jax.tree.map(lambda x: x.reshape((count,) + x.shape[len(sizes) :]), out)

        return batched

    def pull(self, fn: Callable[..., PyTree], wrt: Sequence[bool]) -> Callable[..., PyTree]:
        """The value and the transposed derivative of `fn` over all lanes.

        `fn(consts, x, aux)` is written for one lane. The result maps `(consts, x, aux, ct)` to its
        value, the cotangents of the consts marked in `wrt`, summed over the inner levels they lack,
        and that of `x`.
        """
        inner_sizes = self.sizes[self.outer :]
        inner = self._over(fn, self.outer, len(self.sizes))

        def one(consts: list[Array], x: PyTree, aux: PyTree, ct: PyTree):
            chosen = [c for c, w in zip(consts, wrt, strict=True) if w]

            def primal(chosen: list[Array], x: PyTree) -> PyTree:
                fill = iter(chosen)
                full = [next(fill) if w else c for c, w in zip(consts, wrt, strict=True)]
                return inner(full, x, aux)

            out, transpose = jax.vjp(primal, chosen, x)
            return out, *transpose(ct)

        def batched(consts: list[Array], x: PyTree, aux: PyTree, ct: PyTree):
            f = one
            for i in reversed(range(self.outer)):
                f = jax.vmap(f, in_axes=(self._axes(i), 0, 0, 0))
            split = self.sizes[: self.outer] + (math.prod(inner_sizes),)
            apart = lambda tree: jax.tree.map(lambda a: a.reshape(split + a.shape[1:]), tree)
            out, ct_consts, ct_x = f(consts, apart(x), apart(aux), apart(ct))
            flat = lambda a: a.reshape((self.count,) + a.shape[len(split) :])
            return jax.tree.map(flat, out), ct_consts, jax.tree.map(flat, ct_x)

        return batched


def masked(where: Bool[Array, "..."], tree: PyTree[Array]) -> PyTree[Array]:
    """Lane by lane, zero where it does not hold."""
    return trees.where(where, tree, trees.zeros_like(tree))
