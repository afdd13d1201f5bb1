r"""The backward pass of many steps at once, for small states.

Once the states of a chunk of steps are known, all its steps are linearised at the same time: nothing in
the derivative of one waits for the next. With x = (y, what else travels from step to step), d numbers,

    J_k = d step / d x                                          d tangents a step, in one batch
    b_k = what is added by outputs at the end of step k
    a_k = what is added by outputs inside it, and by its estimates       one transpose, in one batch
    ct_k = J_k^T (ct_{k+1} + b_k) + a_k                         the only recursion: d x d products
    ct_p = sum_k (d step / d p)^T (ct_{k+1} + b_k, ..)          one transpose, in one batch

The steps of a chunk are lanes more (`Lanes.along`), so a step is defined once for both ways, and a
parameter still gets one cotangent.

Cost:       d + 2 evaluations and a transpose of each step (2 and a transpose, step by step), in a number of
            kernels that does not grow with the number of steps. It pays where launching kernels is the
            cost: few trajectories of two equations, on a CPU; `chunk_length` says where.
Memory:     of a chunk: its states, their d x d derivatives and the stages of its steps.
Not for:    complex states, and states of several dtypes.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from nde.solvers import trees
from nde.solvers.adjoint import tape as tapes
from nde.solvers.adjoint.backward import (
    BackwardCarry,
    Places,
    StepPullback,
    added,
    kept_mask,
)
from nde.solvers.adjoint.tape import Ladder, Row, Rows
from nde.solvers.adjoint.traced import Traced
from nde.solvers.lanes.batch import masked

CHUNK = 64  # steps at once, at most
_WORK = 16  # numbers a kernel, times d, in all lanes: beyond, a CPU is faster step by step
_NUMBERS = 2**22  # that a chunk may hold


def chunk_length(
    parallel: bool | None, traced: Traced, x: PyTree[Any], lanes: int, slots: int
) -> int | None:
    """How many steps are taken at once, a power of two; None: step by step. `x`: of one lane.

    Only if the state is one vector of real numbers; without a wish (`parallel` None), if a step is so
    small that launching its kernels is what it costs.
    """
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(x)}
    real = len(dtypes) == 1 and all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)
    if parallel is False or not real:
        return None
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(x))
    kernels, numbers = _work(traced.advance.jaxpr)
    if parallel is None and lanes * size * numbers > _WORK * kernels:
        return None
    length = min(CHUNK, slots)
    while length > 2 and length * lanes * size * min(numbers, _NUMBERS) > _NUMBERS:
        length //= 2
    return length


def _work(jaxpr: Any) -> tuple[float, float]:
    """How many kernels a computation has, and how many numbers they compute: infinitely many where it has
    loops, or effects, which must come step by step."""
    kernels, numbers = 0.0, 0.0
    for eqn in jaxpr.eqns:
        inner = [getattr(p, "jaxpr", p) for p in jax.tree.leaves(tuple(eqn.params.values()))]
        inner = [p for p in inner if hasattr(p, "eqns")]
        name = eqn.primitive.name
        if name in ("while", "scan", "cond") or "callback" in name or eqn.effects:
            return 1.0, math.inf
        if inner:
            parts = [_work(p) for p in inner[:1]]  # a custom rule is not run
            kernels += sum(k for k, _ in parts)
            numbers += sum(n for _, n in parts)
            continue
        each = 1
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            each = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        kernels += 1
        numbers += each * sum(math.prod(getattr(v.aval, "shape", ())) for v in eqn.outvars)
    return max(kernels, 1.0), numbers


def steps_back_at_once(
    pullback: StepPullback, most: Array, rows: Rows, ct: BackwardCarry, length: int
) -> BackwardCarry:
    """Pulls back through all steps, `length` at once."""
    chunks = jnp.where(most > 0, (most - 1) // length + 1, 0)
    chunk = _Chunk(pullback, length)
    keep, ladder = pullback.plan.rows, pullback.plan.ladder
    assert keep is not None
    first = jnp.zeros_like(most)
    if not ladder.most:

        def one(i: Array, ct: BackwardCarry) -> BackwardCarry:
            k0 = (chunks - 1 - i) * length
            return chunk.back(k0, _sliced(rows, k0, length), ct)

        return jax.lax.fori_loop(0, chunks, one, ct)

    mask = kept_mask(most, keep)
    units = _units(most, mask, keep.slots, ladder, length)

    def filled(k0: Array, rows: Rows, memory: PyTree[Array]) -> tuple[Rows, Rows, PyTree[Array]]:
        """The rows of a chunk, replayed from those that are kept."""
        assert units.origin is not None
        begin = units.origin(k0)

        def take(k: Any, carry: Any):
            at, rows, scratch, memory = carry
            k = jnp.asarray(k, jnp.int32)  # a number under `jax.disable_jit`
            fresh = (k & mask == 0) | (k == begin)
            there = pullback.standing(pullback.load(k, tapes.get(rows, units.row(k))))
            at = pullback.with_cache(trees.where(fresh, there, at), fresh)
            at, behind, memory = pullback.advance(k, at, memory)
            row = tapes.pack(pullback.row_of(at))
            rows = tapes.put(rows, jnp.where(k <= k0, units.row(k), keep.slots), row)
            return behind, rows, tapes.put(scratch, jnp.maximum(k - k0, 0), row), memory

        at = pullback.standing(pullback.load(begin, tapes.get(rows, units.row(begin))))
        carry = (at, rows, _sliced(rows, first, length), memory)
        stop = jnp.minimum(k0 + length, most)
        _, rows, scratch, memory = jax.lax.fori_loop(begin, stop, take, carry)
        return scratch, rows, memory

    def one_of(i: Array, carry: tuple[BackwardCarry, Rows]) -> tuple[BackwardCarry, Rows]:
        ct, rows = carry
        k0 = (chunks - 1 - i) * length
        read = lambda k0, rows, memory: (_sliced(rows, k0, length), rows, memory)
        scratch, rows, memory = jax.lax.cond(mask == 0, read, filled, k0, rows, ct.memory)
        return chunk.back(k0, scratch, ct._replace(memory=memory)), rows

    return jax.lax.fori_loop(0, chunks, one_of, (ct, rows))[0]


def _sliced(rows: Rows, k0: Array, length: int) -> Rows:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, k0, length), rows)


def _units(most: Array, mask: Array, slots: int, ladder: Ladder, length: int) -> Places:
    """Where the first steps of chunks stand: in slots, or on the ladder if a stretch has many chunks."""
    shift = length.bit_length() - 1
    q = jnp.maximum(jax.lax.population_count(mask) - shift, 0)
    stored = lambda k: tapes.slot(k, slots)

    def row(k: Array) -> Array:
        j = k & mask
        place = jnp.where(j & (length - 1) == 0, slots + ladder.place(j >> shift, q), slots)
        return jnp.where(j == 0, stored(k), place)

    def origin(k: Array) -> Array:
        j = (k & mask) >> shift
        last = (k + length >= most) | (j + 1 == jnp.left_shift(1, q))
        return k - (k & mask) + (ladder.origin(j, last, q) << shift)

    return Places(row, origin)


class _Chunk:
    """The pullback through some steps at once. Holds what does not change from chunk to chunk."""

    def __init__(self, pullback: StepPullback, length: int):
        self.length, self.lanes = length, pullback.lanes
        self.steps = pullback.along(length)

    def _inner(self) -> tuple[int, int]:
        outer = math.prod(self.lanes.sizes[: self.lanes.outer])
        return outer, self.lanes.count // outer

    def _as_lanes(self, x: Array) -> Array:
        """(steps, lanes, ...) -> lanes of the chunk."""
        x = x.reshape(self.length, *self._inner(), *x.shape[2:])
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[3:])

    def _as_steps(self, x: Array) -> Array:
        """The other way round."""
        outer, inner = self._inner()
        x = jnp.moveaxis(x.reshape(outer, self.length, inner, *x.shape[1:]), 1, 0)
        return x.reshape(self.length, outer * inner, *x.shape[3:])

    def back(self, k0: Array, rows: Rows, ct: BackwardCarry) -> BackwardCarry:
        """From the cotangents behind the chunk that starts at step k0 to those before it."""
        steps = self.steps
        numbers = jnp.broadcast_to(
            (k0 + jnp.arange(self.length, dtype=k0.dtype))[:, None], (self.length, self.lanes.count)
        )
        k = self._as_lanes(numbers)
        loaded: Row = steps.load(k, jax.tree.map(self._as_lanes, rows))
        active = k < steps.steps
        increments, _ = steps.functions.draw(
            loaded.t0, loaded.t1, steps.functions.memory(loaded.t0)
        )
        fn, x, aux = steps.differentiated(loaded, increments)
        nothing = y, inner = trees.zeros_like(x)
        reached = steps.reached(loaded.t1)
        added_here = BackwardCarry(y, inner, ct.consts, reached, ())
        added_here, ct_dense = steps.outputs(k, active, loaded, increments, added_here)
        ct_judged = None
        if steps.judged is not None:
            ct_judged = masked(active, steps.read(steps.judged, k))
        inside = (ct_dense, ct_judged)

        flat = lambda tree: jax.vmap(lambda tree: ravel_pytree(tree)[0])(tree)
        a = jnp.zeros_like(flat(x))
        if jax.tree.leaves(inside):
            ct_x = steps.transpose(fn, (), x, aux, (*nothing, *inside))[2]
            a = flat(masked(active, ct_x))
        b = flat((added_here.y, added_here.inner))
        jacobian = self._jacobian(fn, x, aux)
        parts = [self._as_steps(p) for p in (jacobian, a, b, active)]

        def one(c: Array, part: list[Array]) -> tuple[Array, Array]:
            jacobian, a, b, active = part
            behind = masked(active, c + b)
            before = jnp.einsum("li,lij->lj", behind, jacobian, precision="highest") + a
            return jnp.where(active[:, None], before, c), behind

        before, behind = jax.lax.scan(one, flat((ct.y, ct.inner)), parts, reverse=True)
        again = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], x))[1]
        behind = jax.vmap(again)(self._as_lanes(behind))
        uses = steps.traced.advance.uses
        _, ct_consts, _ = steps.transpose(fn, uses, x, aux, (*behind, *inside))
        y, inner = jax.vmap(again)(before)
        return ct._replace(y=y, inner=inner, consts=added(added_here.consts, ct_consts))

    def _jacobian(self, fn: Callable[..., Any], x: PyTree[Array], aux: PyTree[Array]) -> Array:
        """Of what a step hands on, by what it gets; of every step, as a matrix."""

        def one(consts: list[Array], x: PyTree[Array], aux: PyTree[Array]) -> Array:
            vector, again = ravel_pytree(x)
            return jax.jacfwd(lambda v: ravel_pytree(fn(consts, again(v), aux)[:2])[0])(vector)

        return self.steps.lanes.per_lane(one)(self.steps.consts, x, aux)
