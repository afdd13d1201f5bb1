"""Steps that end where the data are, so many from each knot to the next, and the noise over them.

    step n = steps i + j  runs over  knot_i + [j, j + 1] (knot_(i+1) - knot_i) / steps

The noise over step n is cell n of a `BrownianGrid` of unit cells, scaled to the length h of the step:
W and H by sqrt(h), the space-space area by h.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Real

from nde.solvers import BrownianGrid
from nde.solvers.adjoint.traced import end_floor
from nde.solvers.brownian import bridge
from nde.solvers.brownian.increment import query_times
from nde.solvers.inputs import is_traced


class KnotSteps(diffrax.AbstractStepSizeController):
    """So many steps of equal length from each knot to the next.

    Unlike `diffrax.StepTo` it allows a repeated last knot, the padding: the solve has ended there.

    Args:
        knots: Shape (knots,), in order.
        steps: Steps from knot to knot.
    """

    knots: Float[Array, " knots"]
    steps: int = eqx.field(static=True)

    def wrap(self, direction: Int[Array, ""]) -> "KnotSteps":
        """Itself: a path runs forwards."""
        del direction
        return self

    def init(
        self,
        terms: PyTree[diffrax.AbstractTerm],
        t0: Array,
        t1: Array,
        y0: PyTree[Array],
        dt0: Array | None,
        args: PyTree[Any],
        func: Callable,
        error_order: Any,
    ) -> tuple[Array, Array]:
        """The end of the first step, and the number of steps begun."""
        begun = jnp.asarray(1, dtype=jnp.int32)
        return self._end(begun), begun

    def adapt_step_size(
        self,
        t0: Array,
        t1: Array,
        y0: PyTree[Array],
        y1_candidate: PyTree[Array],
        args: PyTree[Any],
        y_error: PyTree[Array] | None,
        error_order: Any,
        controller_state: Array,
    ) -> tuple[bool, Array, Array, bool, Array, Any]:
        """Every step is accepted."""
        begun = controller_state + 1
        return True, t1, self._end(begun), False, begun, diffrax.RESULTS.successful

    def _end(self, step: Int[Array, ""]) -> Float[Array, ""]:
        if self.steps == 1:
            return self.knots[step]
        knot, part = step // self.steps, step % self.steps
        here = self.knots[knot]
        share = part.astype(here.dtype) / self.steps
        following = self.knots[jnp.minimum(knot + 1, self.knots.shape[0] - 1)]
        return here + share * (following - here)


class KnotNoise(diffrax.AbstractBrownianPath):
    """Brownian motion over the steps of `KnotSteps`, and over nothing else.

    Args:
        knots: As those of the steps.
        steps: As those of the steps.
        shape: Of the noise.
        key: One random key.
        levy_area: What an increment holds, as in `BrownianGrid`.
    """

    knots: Float[Array, " knots"]
    steps: int = eqx.field(static=True)
    grid: BrownianGrid

    def __init__(
        self,
        knots: Float[Array, " knots"],
        steps: int,
        shape: tuple[int, ...],
        key: PRNGKeyArray,
        levy_area: Any,
    ):
        self.knots, self.steps = knots, steps
        noise = jax.ShapeDtypeStruct(shape, knots.dtype)
        cells = (knots.shape[0] - 1) * steps
        self.grid = BrownianGrid(0.0, float(cells), 1.0, noise, key, levy_area)

    @property
    def t0(self) -> Real[Any, ""]:
        return self.knots[0]

    @property
    def t1(self) -> Real[Any, ""]:
        return self.knots[-1]

    @property
    def shape(self) -> Any:
        return self.grid.shape

    @property
    def levy_area(self) -> Any:
        return self.grid.levy_area

    def evaluate(
        self,
        t0: Real[Any, ""],
        t1: Real[Any, ""] | None = None,
        left: bool = True,
        use_levy: bool = False,
    ) -> Any:
        """The increment over the step from t0 to t1."""
        del left
        start, end = query_times(t0, self.knots[-1] if t1 is None else t1)
        n, off = self._step(start, end)
        n = eqx.error_if(
            n,
            off,
            "`steps_per_interval` fixes the steps, and the noise is drawn over each as a whole, but the "
            "solver asked for that of another interval. Use a solver that takes each step once, or "
            "steps_per_interval=None with an adaptive `stepsize_controller`.",
        )
        cell: Any = self.grid.cell(n, use_levy)
        zero = bridge.opaque_zero(self.grid.key, n)
        length = end - start
        # A root at zero, in the padding, has no derivative; nothing is differentiated by times here.
        root = jnp.sqrt(length)

        def scaled(x: Array, by: Array) -> Array:
            return bridge.pinned(by.astype(x.dtype) * x, zero)  # the same bits in every program

        if not use_levy:
            return scaled(cell, root)
        powers = {"dt": length, "W": root, "H": root, "A": length}
        parts = {
            f.name: scaled(getattr(cell, f.name), powers[f.name]) for f in dataclasses.fields(cell)
        }
        return type(cell)(**parts)

    def _step(self, start: Array, end: Array) -> tuple[Int[Array, ""], Array]:
        """The number of the step from start to end, and whether there is none."""
        middle = start + (end - start) / 2
        last = self.knots.shape[0] - 2
        knot = jnp.clip(jnp.searchsorted(self.knots, middle, side="right") - 1, 0, last)
        here = self.knots[knot]
        width = (self.knots[knot + 1] - here) / self.steps
        part = jnp.clip(
            jnp.floor((middle - here) / jnp.where(width > 0, width, 1)), 0, self.steps - 1
        )
        rounding = 4 * jnp.finfo(start.dtype).eps * jnp.max(jnp.abs(self.knots[jnp.array([0, -1])]))
        slack = 1e-3 * width + rounding
        off = (jnp.abs(start - (here + part * width)) > slack) | (
            jnp.abs(end - start - width) > slack
        )
        return (knot * self.steps + part.astype(knot.dtype)).astype(jnp.int32), off


def check_last_step(
    z0: Float[Array, " state"], knots: Float[Array, " knots"], steps: int
) -> Float[Array, " state"]:
    """`z0`, if the solver takes the last step: one that begins at the very end of a solve is merged
    with the one before, and sees its data.
    """
    if knots.shape[0] == 2 and steps == 1:
        return z0
    knots = jax.lax.stop_gradient(knots)
    start, end = knots[0], knots[-1]
    before = jnp.max(jnp.where(knots < end, knots, start))  # padding repeats the last
    begins = end - (end - before) / steps
    merged = (begins > end_floor(end)) & (begins > start)
    told = (
        "The last step of the path is too short for the precision of its times: a solver merges a "
        "step within 100 spacings of the end with the one before. Subtract an offset from `ts`, such "
        "as the first time, or use float64."
    )
    if is_traced(z0, knots):
        return eqx.error_if(z0, merged, told)
    if merged:
        raise ValueError(f"{told} It begins at {begins} and ends at {end}, in {knots.dtype}.")
    return z0
