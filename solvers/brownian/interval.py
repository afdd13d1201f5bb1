r"""The Brownian interval: Brownian motion at any times, the same bits whatever was asked before.

A virtual binary tree of bridges over [t0, t1] (`branch`), down to leaves of length at most tol. A
query [s, t] joins the nodes between s and t; a time inside a leaf cuts that leaf at the time
itself, so the law is exact at every queried time as long as no two of them are inside one leaf. No
cumulative value W(t) - W(t0) is ever subtracted from another: in float32 that would cost H a
relative error of eps (T/h)^(3/2).

    state = path.init()
    dW, state = path.draw(t, t + h, state)        # about 4 draws if h is rounded
    dW, state = path.draw(t, t + h, state)        # again, or backwards: the same bits
    dW == path.evaluate(t, t + h)                    # the state changes the cost, never the result

Rounding the end of a step down to a few significant bits (`round_down`) makes it a node high up in
the tree.

Cost:       per query, one draw for each level between the last place and the new one; at most two branches
            (2 log2(T/tol)) without a state. Memory: one branch.
Not for:    steps below tol (an error), or gradients with respect to times.
Reference:  Efficient and accurate gradients for neural SDEs (2021) | arXiv:2105.13493
            Single-seed generation of Brownian paths and integrals (2024) | arXiv:2405.06464
"""

import math
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree, Real

from nde.solvers.brownian import bridge
from nde.solvers.brownian.branch import MAX_DEPTH, Branch, Place, Tree
from nde.solvers.brownian.increment import (
    LevyArea,
    Shape,
    as_structs,
    check_interval,
    check_levy_area,
    query_times,
    step_length,
    unravel,
    vector_dtype,
    vector_size,
)
from nde.solvers.inputs import check_key, known_number

_DEFAULT_DEPTH = 24
_ULPS_OUTSIDE = 4


class BrownianInterval(diffrax.AbstractBrownianPath):
    """Brownian motion on [t0, t1] that can be queried at any times, in any order, and remembers its
    last place.

    Args:
        t0: Start of the interval (time).
        t1: End of the interval (time), after `t0`. Queries may miss the ends by 4 ulp, and are
            clamped.
        shape: Shape of the noise: a tuple of ints, or a pytree of `jax.ShapeDtypeStruct`.
        key: One random key. For a batch of paths, make the path inside the function that is
            vmapped.
        levy_area: `diffrax.BrownianIncrement` or `diffrax.SpaceTimeLevyArea`; the path depends on
            which.
        tol: Longest leaf (time), at most the shortest step; by default 2^-24 of the interval.

    Raises:
        ValueError: for an empty, reversed or endless interval, a `tol` that is not positive or below
            2^-30 of the interval (one that is known only at run time is cut off there), a `shape`,
            `key` or `levy_area` that cannot be used, a query outside the interval or within one leaf
            (where these are known only at run time: see `evaluate` and `draw`).

    Reference:
        Efficient and accurate gradients for neural SDEs (2021) | arXiv:2105.13493
    """

    t0: Real[Any, ""]
    t1: Real[Any, ""]
    tol: Real[Any, ""] | None
    shape: PyTree[jax.ShapeDtypeStruct] = eqx.field(static=True)
    levy_area: LevyArea = eqx.field(static=True)  # pyright: ignore[reportIncompatibleVariableOverride] (as checked)
    key: PRNGKeyArray

    def __init__(
        self,
        t0: Real[Any, ""],
        t1: Real[Any, ""],
        shape: Shape,
        key: PRNGKeyArray,
        levy_area: LevyArea = diffrax.BrownianIncrement,
        tol: Real[Any, ""] | None = None,
    ):
        name = type(self).__name__
        self.shape = as_structs(shape, name, "t0, t1, shape, key, levy_area, tol")
        check_levy_area(levy_area, (diffrax.BrownianIncrement, diffrax.SpaceTimeLevyArea), name)
        check_key(key, name)
        check_interval(t0, t1, name)
        self.t0, self.t1, self.tol = t0, t1, tol
        self.levy_area, self.key = levy_area, key
        leaf, depth = (None if tol is None else known_number(tol)), self._known_depth()
        if (leaf is not None and not leaf > 0) or (depth is not None and depth > MAX_DEPTH):
            raise ValueError(
                f"`tol` of {name} is {leaf} on [{t0}, {t1}]; it must be positive and at "
                "least 2^-30 of the interval. The shortest step of the solve is a good choice."
            )

    def evaluate(
        self,
        t0: Real[Any, ""],
        t1: Real[Any, ""] | None = None,
        left: bool = True,
        use_levy: bool = False,
    ) -> PyTree[Array] | diffrax.AbstractBrownianIncrement:
        """W(t1) - W(t0), with the pytree of `shape`; with `t0` alone, W(t0) measured from the
        path's start.

        Args:
            t0: A time in the interval.
            t1: Another, after or before it.
            left: Ignored: Brownian motion has no jumps.
            use_levy: Return an increment of type `levy_area` in place of W alone.

        Raises:
            ValueError: if the query leaves the interval or lies within one leaf; by
                `equinox.error_if`
                where the times are known only at run time.
        """
        del left
        a, b = query_times(self.t0 if t1 is None else t0, t0 if t1 is None else t1)
        self._refuse_known(a, b)
        parts, sign, _, outside, short = self._query(a, b, None)
        span = "" if self._known_span() is None else f" [{self.t0}, {self.t1}]"
        outside_text = f"BrownianInterval was queried outside its interval [`t0`, `t1`]{span}."
        short_text = (
            "BrownianInterval was queried over less than one leaf: the step is below the resolution of "
            f"the path, {self._resolution()}. Make `tol` smaller than the shortest step, or set `dtmin`."
        )
        which = jnp.where(outside, 0, 1)
        sign = eqx.branched_error_if(sign, outside | short, which, [outside_text, short_text])
        return self._pack(b - a, parts, sign, use_levy)

    def init(self) -> Branch:
        """A state that remembers nothing yet: one branch, arrays of shape (levels, size)."""
        depth = self._known_depth()
        rows = (MAX_DEPTH if depth is None else depth) + 2
        return self._tree().plant(rows, vector_size(self.shape), vector_dtype(self.shape))

    def draw(
        self, t0: Real[Any, ""], t1: Real[Any, ""], state: Branch, use_levy: bool = False
    ) -> tuple[PyTree[Array] | diffrax.AbstractBrownianIncrement, Branch]:
        """What `evaluate(t0, t1)` returns, bit for bit, and the state for the next query.

        Cheap if the next query starts or ends where this one did. Any earlier state may be used
        instead: after a rejected step, either the old one (costs a copy) or the new one (costs a
            few draws).

        Args:
            t0: A time in the interval.
            t1: Another, after or before it.
            state: From `init` or from an earlier `draw` of the same path.
            use_levy: Return an increment of type `levy_area` in place of W alone.

        Returns:
            The increment, with the pytree of `shape`, and the new state. A bad query (see
            `evaluate`) whose times are known only at run time gives NaN: a loop must be able to
            fail one lane and go on.
        """
        a, b = query_times(t0, t1)
        self._refuse_known(a, b)
        parts, sign, state, outside, short = self._query(a, b, state)
        parts = tuple(jnp.where(outside | short, jnp.nan, x) for x in parts)
        return self._pack(b - a, parts, sign, use_levy), state

    def covers(self, t: Float[Array, ""]) -> Bool[Array, ""]:
        """Whether `t` lies in the interval, or within a few roundings of it; false for NaN."""
        t0, t1 = self._ends(t.dtype)
        slack = _ULPS_OUTSIDE * jnp.spacing(jnp.maximum(jnp.abs(t0), jnp.abs(t1)))
        return (t >= t0 - slack) & (t <= t1 + slack)

    def round_down(
        self, t0: Real[Any, ""], t1: Real[Any, ""], *, bits: int = 3
    ) -> Float[Array, ""]:
        """The end t1 of a step from t0, moved towards t0 to a node that is found high up in the
        tree.

        The new end is a multiple of the largest 2^-k of the path's interval that is at most 2^-bits
        of the step, so the step loses less than 2^-bits of its length. The path's own ends stay as
        they are, and so does a step below one leaf. Call it on every proposed end of an adaptive
        step.

        Args:
            t0: Start of the step (time).
            t1: Proposed end (time), after or before `t0`.
            bits: Significant bits of the step that are kept: more bits, less lost, more draws.
        """
        a, b = query_times(t0, t1)
        p, q = self._place(a), self._place(b)
        forward = b >= a
        p_up, q_up = (x.leaf + (x.fraction > 0).astype(jnp.int32) for x in (p, q))
        leaves = jnp.where(forward, q.leaf - p_up, p.leaf - q_up)
        exponent = 31 - jax.lax.clz(jnp.maximum(leaves, 1)) - bits
        mask = (jnp.int32(1) << jnp.maximum(exponent, 0)) - 1
        down, up = q.leaf & ~mask, (q_up + mask) & ~mask
        rounded = self._time(jnp.where(forward, down, up), b.dtype)
        rounded = jnp.where(forward, jnp.minimum(rounded, b), jnp.maximum(rounded, b))
        return jnp.where(leaves >= 1, rounded, b)

    # Times and places

    def _ends(self, dtype) -> tuple[Float[Array, ""], Float[Array, ""]]:
        t0, t1 = query_times(self.t0, self.t1)
        return t0.astype(dtype), t1.astype(dtype)

    def _resolution(self) -> str:
        if self.tol is None:
            return f"2^-{_DEFAULT_DEPTH} of its interval, the default `tol`"
        known = known_number(self.tol)
        return "its `tol`" if known is None else f"its `tol`={known}"

    def _known_span(self) -> float | None:
        t0, t1 = known_number(self.t0), known_number(self.t1)
        return None if t0 is None or t1 is None else t1 - t0

    def _known_depth(self) -> int | None:
        """Number of levels, where it does not depend on values that only the running program knows."""
        if self.tol is None:
            return _DEFAULT_DEPTH
        span, tol = self._known_span(), known_number(self.tol)
        if span is None or tol is None or not tol > 0:
            return None
        return max(math.ceil(math.log2(span / tol)), 0)

    def _tree(self) -> Tree:
        depth = self._known_depth()
        if depth is None:
            t0, t1 = self._ends(jnp.result_type(float))
            tol = jnp.asarray(self.tol, t0.dtype)
            depth = jnp.clip(jnp.ceil(jnp.log2((t1 - t0) / tol)), 0, MAX_DEPTH).astype(jnp.int32)
        parts = 1 if self.levy_area is diffrax.BrownianIncrement else 2
        return Tree(self.key, jnp.asarray(depth, jnp.int32), parts)

    def _place(self, t) -> Place:
        """Where t is. A time within rounding of a node is the node: nodes survive floating point."""
        t0, t1 = self._ends(t.dtype)
        depth = self._tree().depth
        leaves = jnp.ldexp(jnp.ones((), t.dtype), depth)
        x = jnp.clip((t - t0) / (t1 - t0), 0, 1)
        scaled, nearest = x * leaves, jnp.round(x * leaves)
        size = x + jnp.maximum(jnp.abs(t), jnp.abs(t0)) / (t1 - t0)
        node = jnp.abs(scaled - nearest) <= leaves * jnp.finfo(t.dtype).eps * size
        leaf = jnp.where(node, nearest, jnp.floor(scaled))
        fraction = jnp.where(node, 0, scaled - leaf)
        return Place(leaf.astype(jnp.int32), fraction.astype(vector_dtype(self.shape)))

    def _time(self, leaf, dtype) -> Float[Array, ""]:
        t0, t1 = self._ends(dtype)
        depth = self._tree().depth
        time = t0 + leaf.astype(dtype) * jnp.ldexp(t1 - t0, -depth)
        return jnp.where(leaf == jnp.int32(1) << depth, t1, time)

    def _refuse_known(self, a, b) -> None:
        """Raises with the numbers where they are known before the program runs."""
        start, stop = known_number(a), known_number(b)
        if start is None or stop is None or self._known_span() is None:
            return
        for t, value in ((a, start), (b, stop)):
            if not self.covers(t):
                raise ValueError(
                    f"BrownianInterval was queried at t={value}, outside its interval "
                    f"[`t0`, `t1`] = [{self.t0}, {self.t1}]. Give the path the interval of the solve."
                )
        p, q = self._place(a), self._place(b)
        if start != stop and _same_leaf(p, q):
            raise ValueError(
                f"BrownianInterval was queried on [{start}, {stop}]: the step {abs(stop - start)} is below "
                f"the resolution of the path, {self._resolution()}. Make `tol` smaller than the shortest "
                "step."
            )

    # Queries

    @eqx.filter_jit
    def _query(self, a, b, state: Branch | None):
        """W (and H) between a and b, the sign of b - a, the new state, and what is wrong with the query."""
        state = self.init() if state is None else state
        p, q = self._place(jnp.minimum(a, b)), self._place(jnp.maximum(a, b))
        tree, zero = self._tree(), bridge.opaque_zero(self.key, p.leaf, q.leaf)
        whole, state = tree.increment(p, q, state)
        t0, t1 = self._ends(a.dtype)
        # The tree has length 1: W and H scale with the root of the interval's length.
        scale = jnp.sqrt(t1 - t0).astype(vector_dtype(self.shape))
        parts = (bridge.pinned(scale * x, zero) for x in bridge.area(whole, zero))
        outside = ~(self.covers(a) & self.covers(b))
        short = (a != b) & _same_leaf(p, q)
        return tuple(parts), jnp.sign(b - a), state, outside, short

    def _pack(self, dt, parts, sign, use_levy):
        """The increment in diffrax's form. Reversing a stretch negates W and leaves H as it is."""
        w = unravel(sign.astype(parts[0].dtype) * parts[0], self.shape)
        if not use_levy:
            return w
        dt = step_length(dt, self.shape)
        if self.levy_area is diffrax.BrownianIncrement:
            return diffrax.BrownianIncrement(dt=dt, W=w)
        return diffrax.SpaceTimeLevyArea(dt=dt, W=w, H=unravel(parts[1], self.shape))


def _same_leaf(p: Place, q: Place) -> Bool[Array, ""]:
    """Whether p and q are one node, or both inside one leaf: too near to be told apart."""
    return (p.leaf == q.leaf) & ((p.fraction > 0) == (q.fraction > 0))
