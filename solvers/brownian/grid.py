r"""Brownian motion on a fixed grid: the increment of a cell is a function of its number alone.

Cell n of a grid of spacing dt is drawn when asked for, and the same every time:

    W_n = sqrt(dt) normal(fold_in(key, n))          H_n = sqrt(dt/12) normal(fold_in(c_n, 2^32 - 2))
    A_n = Foster's area of (W_n, H_n)               c_n = fold_in(key, n)

so W is what `normal(fold_in(key, n))` in a hand-written scan would give, and does not depend on
what else is asked for. The last cell is shorter where dt does not divide the interval. A query over
several cells joins them (`bridge`, `levy`); a reversed query negates W and A, and leaves H as it
is.

Cost:       one normal draw for one cell, no memory, in any order, forwards and backwards.
Not for:    adaptive steps. A query that does not start and end on grid points is an error rather than a
            bridge: the bridge of one query cannot know what another query in the same cell has
            revealed, so either every query would pay for a tree, or the noise would be wrong.
            `BrownianInterval` pays.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Real

from nde.solvers.brownian import bridge, threefry
from nde.solvers.brownian.increment import (
    LevyArea,
    Shape,
    SpaceSpaceLevyArea,
    as_structs,
    check_interval,
    check_levy_area,
    query_times,
    salted,
    step_length,
    unravel,
    vector_dtype,
    vector_size,
)
from nde.solvers.brownian.levy import foster_area, join_areas
from nde.solvers.inputs import check_key, known_number

# How far from a grid point, in cells, a time may be and still mean that point. Times that a solver
# computes from a step number miss by rounding alone; steps of another size miss by far more within
# a few steps.
_SLACK = 1e-3


class BrownianGrid(diffrax.AbstractBrownianPath):
    """Brownian motion for fixed steps: increments of the cells of a grid, reproducible at no cost.

    Args:
        t0: Start of the grid (time).
        t1: End of the grid (time), after `t0`.
        dt: Spacing (time), positive; the last cell is shorter if it does not divide `t1 - t0`.
        shape: Shape of the noise: a tuple of ints, or a pytree of `jax.ShapeDtypeStruct`.
        key: One random key. For a batch of paths, make the path inside the function that is
            vmapped.
        levy_area: What an increment holds: `diffrax.BrownianIncrement`,
            `diffrax.SpaceTimeLevyArea`, or
            `SpaceSpaceLevyArea` (one vector of channels only). W is the same for all three.

    Raises:
        ValueError: for an empty or reversed interval, a spacing that is not positive, a `shape`,
            `key` or
            `levy_area` that cannot be used, or a query that leaves the grid or falls between grid
            points (where these are known only at run time, `equinox.error_if` reports them).
    """

    t0: Real[Any, ""]
    t1: Real[Any, ""]
    dt: Real[Any, ""]
    shape: PyTree[jax.ShapeDtypeStruct] = eqx.field(static=True)
    levy_area: LevyArea = eqx.field(static=True)  # pyright: ignore[reportIncompatibleVariableOverride] (ours adds A)
    key: PRNGKeyArray

    def __init__(
        self,
        t0: Real[Any, ""],
        t1: Real[Any, ""],
        dt: Real[Any, ""],
        shape: Shape,
        key: PRNGKeyArray,
        levy_area: LevyArea = diffrax.BrownianIncrement,
    ):
        name = type(self).__name__
        allowed = (diffrax.BrownianIncrement, diffrax.SpaceTimeLevyArea, SpaceSpaceLevyArea)
        self.shape = as_structs(shape, name, "t0, t1, dt, shape, key, levy_area")
        check_levy_area(levy_area, allowed, name)
        check_key(key, name)
        check_interval(t0, t1, name)
        spacing = known_number(dt)
        if spacing is not None and not spacing > 0:
            raise ValueError(f"`dt` of {name} is {spacing}; it must be positive.")
        self.t0, self.t1, self.dt = t0, t1, dt
        self.levy_area, self.key = levy_area, key
        structs = jax.tree.leaves(self.shape)
        if levy_area is SpaceSpaceLevyArea and (len(structs) != 1 or len(structs[0].shape) != 1):
            raise ValueError(
                f"`shape` of {name} is {shape}; SpaceSpaceLevyArea needs one vector of channels, (n,)."
            )

    def evaluate(
        self,
        t0: Real[Any, ""],
        t1: Real[Any, ""] | None = None,
        left: bool = True,
        use_levy: bool = False,
    ) -> PyTree[Array] | diffrax.AbstractBrownianIncrement:
        """W(t1) - W(t0), with the pytree of `shape`; with `t0` alone, W(t0) measured from the
        grid's start.

        Args:
            t0: A grid point (time).
            t1: Another, after or before it (time).
            left: Ignored: Brownian motion has no jumps.
            use_levy: Return an increment of type `levy_area` in place of W alone.
        """
        del left
        a, b = query_times(self.t0 if t1 is None else t0, t0 if t1 is None else t1)
        parts, sign, off = self._query(a, b)
        return self._pack(b - a, parts, self._checked(a, b, sign, off), use_levy)

    def cell(
        self, n: Int[Any, ""], use_levy: bool = False
    ) -> PyTree[Array] | diffrax.AbstractBrownianIncrement:
        """The increment of cell n, from `t0 + n dt`, in the pytree of `shape`; NaN if there is no
        such cell.

        For loops that know the number of the step: no time is looked up, so nothing can be off the
        grid.

        Args:
            n: Number of the cell (a scalar), from 0.
            use_levy: Return an increment of type `levy_area` in place of W alone.
        """
        n = jnp.asarray(n, jnp.int32)
        width = self._width(n)
        return self._pack(width, self._cell(n, width), jnp.int32(1), use_levy)

    # The grid: cell n is [t0 + n dt, t0 + (n + 1) dt], the last one ends at t1.

    def _scalars(self, dtype):
        return (jnp.asarray(x).astype(dtype) for x in (self.t0, self.t1, self.dt))

    def _cells(self, dtype) -> tuple[Int[Array, ""], Float[Array, ""]]:
        """Number of cells, and the length of the last one."""
        t0, t1, dt = self._scalars(dtype)
        spacings = (t1 - t0) / dt
        whole = jnp.round(spacings)
        # Rounding in (t1 - t0)/dt must not open a sliver of a cell at the end, nor spoil its length.
        even = jnp.abs(spacings - whole) <= _SLACK
        cells = jnp.where(even, whole, jnp.ceil(spacings))
        last = jnp.where(even, dt, (t1 - t0) - (cells - 1) * dt)
        return cells.astype(jnp.int32), last

    def _width(self, n) -> Float[Array, ""]:
        dtype = jnp.result_type(float)
        cells, last = self._cells(dtype)
        _, _, dt = self._scalars(dtype)
        width = jnp.where(n == cells - 1, last, dt)
        return jnp.where((n >= 0) & (n < cells), width, jnp.nan)

    def _nearest(self, t) -> tuple[Int[Array, ""], Bool[Array, ""]]:
        """Number of the grid point nearest to t, and whether t is too far from it to mean it."""
        t0, t1, dt = self._scalars(t.dtype)
        cells, last = self._cells(t.dtype)
        n = jnp.round((t - t0) / dt).astype(jnp.int32)
        n = jnp.where(t - t1 > -last / 2, cells, jnp.clip(n, 0, cells - 1))
        point = jnp.where(n == cells, t1, t0 + n.astype(t.dtype) * dt)
        rounding = 4 * jnp.finfo(t.dtype).eps * jnp.maximum(jnp.abs(t0), jnp.abs(t1))
        return n, ~(jnp.abs(t - point) <= jnp.minimum(_SLACK * dt + rounding, last / 4))

    def _checked(self, a, b, sign, off):
        """`sign`, tied to an error where the query [a, b] is off the grid."""
        t0, t1, dt, start, stop = (known_number(x) for x in (self.t0, self.t1, self.dt, a, b))
        grid = "its grid" if None in (t0, t1, dt) else f"its grid [{t0}, {t1}] of spacing `dt`={dt}"
        asked = "an interval" if None in (start, stop) else f"the interval [{start}, {stop}]"
        message = (
            f"{type(self).__name__} was asked for {asked} that does not start and end on points of {grid}. "
            "Give the solve and the path the same `t0` and `t1`, with `dt0` a whole number of cells that "
            "divides the interval, or use BrownianInterval, which also serves adaptive steps."
        )
        if None not in (start, stop) and known_number(off):
            raise ValueError(message)
        return eqx.error_if(sign, off, message)

    # The noise.

    def _cell(self, n, width) -> tuple[Array, ...]:
        """W, (W, H) or (W, H, A) of cell n as flat vectors."""
        dtype, size = vector_dtype(self.shape), vector_size(self.shape)
        zero = bridge.opaque_zero(self.key)
        width = width.astype(dtype)
        key = threefry.fold_in(self.key, n)

        def scaled(root, key):
            # Two roundings, pinned, so that every program gets the same bits: a constant root would
            # be multiplied into the constants of the draw, and the product into whatever adds it.
            draw = bridge.pinned(threefry.normal(key, (size,), dtype), zero)
            return bridge.pinned(root * draw, zero)

        def draws() -> tuple[Array, ...]:
            w = scaled(jnp.sqrt(width), key)
            if self.levy_area is diffrax.BrownianIncrement:
                return (w,)
            return w, scaled(jnp.sqrt(width / 12), salted(key, 1))

        # Cells that do not exist (NaN) have numbers too: -1, for one.
        w, *h = bridge.materialized(n > -2, draws)
        if self.levy_area is not SpaceSpaceLevyArea:
            return w, *h
        increment = diffrax.SpaceTimeLevyArea(dt=width, W=w, H=h[0])
        area = bridge.materialized(n > -2, lambda: foster_area(increment, key=salted(key, 2)))
        return w, *h, area

    @eqx.filter_jit
    def _query(self, a, b):
        """The cells between a and b in one piece, the sign of b - a, and whether they are off the grid."""
        (first, off_first), (last, off_last) = self._nearest(a), self._nearest(b)
        dtype = vector_dtype(self.shape)
        zero = bridge.opaque_zero(self.key)
        stop = jnp.maximum(first, last)

        def append(carry):
            n, width, whole = carry
            new_width = self._width(n).astype(dtype)
            new = self._cell(n, new_width)
            return n + 1, width + new_width, _joined(whole, width, new, new_width, zero)

        start = jnp.minimum(first, last)
        # An empty query, at the end of the grid too, still needs some cell to multiply by zero.
        n = jnp.clip(start, 0, self._cells(a.dtype)[0] - 1)
        width = self._width(n).astype(dtype)
        carry = (n + 1, width, self._cell(n, width))
        # Most queries are one cell, for which this loop does not turn at all.
        _, _, parts = jax.lax.while_loop(lambda carry: carry[0] < stop, append, carry)
        return parts, jnp.sign(last - first), off_first | off_last

    def _pack(self, dt, parts, sign, use_levy):
        """The increment in diffrax's form; `sign` is -1 for a reversed query and 0 for an empty one."""
        dt = step_length(dt, self.shape)
        w = unravel(sign.astype(parts[0].dtype) * parts[0], self.shape)
        if not use_levy:
            return w
        if self.levy_area is diffrax.BrownianIncrement:
            return diffrax.BrownianIncrement(dt=dt, W=w)
        h = unravel(jnp.square(sign).astype(parts[1].dtype) * parts[1], self.shape)
        if self.levy_area is diffrax.SpaceTimeLevyArea:
            return diffrax.SpaceTimeLevyArea(dt=dt, W=w, H=h)
        return SpaceSpaceLevyArea(
            dt=dt, W=w, H=h, A=sign.astype(w.dtype) * parts[2].astype(w.dtype)
        )


def _joined(first, first_width, second, second_width, zero):
    """W, (W, H) or (W, H, A) of two neighbors in one piece."""
    one = bridge.piece(first[:2], first_width, zero)
    two = bridge.piece(second[:2], second_width, zero)
    areas = (
        join_areas(x, y, first[0], second[0], zero)
        for x, y in zip(first[2:], second[2:], strict=True)
    )
    return *bridge.area(bridge.join(one, two, zero), zero), *areas
