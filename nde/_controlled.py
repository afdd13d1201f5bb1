"""What the models driven by a control path share: their numerics, their checks and the solve.

    dz = F(z) dX,        F(z) of shape (state, channels), X a path of `nde.paths`.

Where X is smooth this is the ODE dz/dt = F(z) X'(t). Where its derivative jumps, at knots, a step
ends at each knot and takes increments of X: no stage of a step can see the piece after it.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from nde._protocol import Rates, check_spacing, check_state, check_times
from nde._run import run
from nde.paths import AbstractControl
from nde.solvers.adjoint.traced import end_floor
from nde.solvers.inputs import check_count, check_tolerances, is_traced


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

    def init(self, terms, t0, t1, y0, dt0, args, func, error_order):
        """The end of the first step, and the number of steps begun."""
        del terms, t0, t1, y0, dt0, args, func, error_order
        begun = jnp.asarray(1, dtype=jnp.int32)
        return self._end(begun), begun

    def adapt_step_size(
        self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state
    ):
        """Every step is accepted."""
        del t0, y0, y1_candidate, args, y_error, error_order
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


def solve_cde(
    model: Any,
    matrix: Callable,
    control: AbstractControl,
    z0: Float[Array, " state"],
    ts: Float[Array, " times"] | None,
    args: PyTree[Any],
    *,
    throw: bool,
) -> diffrax.Solution:
    """Check the input and solve dz = matrix(t, z, args) dX over the whole path.

    `.ys` is the state at `ts`, shape (times, state), or at the end alone, shape (1, state).
    `model` has the numerics of `nde._protocol.AbstractODE`, and `steps_per_interval`.
    """
    check_state(z0)
    dtype = max(control.ts.dtype, z0.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
    control, z0 = jax.tree.map(lambda x: _cast(x, dtype), (control, z0))
    check_tolerances(model.stepsize_controller, z0)
    check_matrix(matrix, control, z0, args)
    if ts is not None:
        check_times(ts, None)
        check_spacing("ts", ts)
        ts = ts.astype(dtype)
        _check_inside(ts, control)
    controller, max_steps = stepping(model, control)
    if controller is not model.stepsize_controller:  # steps end at the knots
        z0 = _check_last_step(z0, control.ts, model.steps_per_interval or 1)
    term = diffrax.ControlTerm(Rates(matrix), control)
    return run(
        model,
        term.to_ode() if control.smooth else term,
        t0=control.t0,
        t1=control.t1,
        dt0=None if model.steps_per_interval else model.dt0,
        y0=z0,
        args=args,
        saveat=diffrax.SaveAt(t1=True) if ts is None else diffrax.SaveAt(ts=ts),
        stepsize_controller=controller,
        max_steps=max_steps,
        throw=throw,
    )


def stepping(
    model: Any, control: AbstractControl
) -> tuple[diffrax.AbstractStepSizeController, int | None]:
    """How long the steps are, and how many there can be."""
    intervals = control.ts.shape[0] - 1
    if model.steps_per_interval is not None:
        return KnotSteps(control.ts, model.steps_per_interval), model.steps_per_interval * intervals
    controller, max_steps = model.stepsize_controller, model.max_steps
    if control.smooth:
        return controller, max_steps
    if not isinstance(controller, diffrax.AbstractAdaptiveStepSizeController):
        raise ValueError(
            f"`stepsize_controller` is {type(controller).__name__}, but the derivative of the path "
            "jumps at its knots, where a step must end. Use `steps_per_interval=1`, or "
            "`stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-6)`."
        )
    if max_steps is not None and max_steps < intervals:
        raise ValueError(
            f"`max_steps` is {max_steps} but a step ends at each of the {intervals} knots of the "
            f"path; give at least {4 * intervals}."
        )
    return diffrax.ClipStepSizeController(controller, step_ts=control.ts), max_steps


def check_steps(steps_per_interval: int | None) -> None:
    """A positive integer, or None."""
    if steps_per_interval is not None:
        hint = ", or None to let `stepsize_controller` choose the steps"
        check_count("steps_per_interval", steps_per_interval, hint)


def check_control(control: AbstractControl, causal: bool) -> None:
    """`control` is a path of `nde.paths`, for one example; and causal if that is asked."""
    if not isinstance(control, AbstractControl):
        raise ValueError(
            f"`control` is a {type(control).__name__}; make a path of the data first: "
            "nde.paths.hermite_cubic(ts, ys)."
        )
    if control.ts.ndim != 1:
        raise ValueError(
            f"`control` has knots of shape {control.ts.shape}; one model call takes one path. Use "
            "jax.vmap over the batch."
        )
    if causal and not control.causal:
        raise ValueError(
            "`control` looks ahead, but the model is `causal`. Use nde.paths.rectilinear(ts, ys), "
            "or linear or hermite_cubic with causal=True."
        )


def initial_of(initial: Callable, x: Float[Array, " channels"]) -> Float[Array, " hidden"]:
    """initial(x), or what is wrong with it."""
    try:
        z = initial(x)
    except (TypeError, IndexError) as error:
        raise ValueError(
            f"`initial` cannot be applied to the first value of the path, shape {x.shape}: "
            f"{str(error).splitlines()[0]} The time, and counts, are channels of the path."
        ) from error
    if jnp.ndim(z) != 1:
        raise ValueError(f"`initial` returned shape {jnp.shape(z)}; a hidden state is (hidden,).")
    return z


def check_matrix(
    matrix: Callable, control: AbstractControl, z0: Float[Array, " state"], args: PyTree[Any]
) -> None:
    """`matrix(t, z, args)` has a row per entry of the state and a column per channel."""
    channels = jax.eval_shape(control.evaluate, control.t0).shape[0]
    try:
        shape = eqx.filter_eval_shape(matrix, control.t0, z0, args).shape
    except (TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"`vector_field` cannot be applied to a state of shape {z0.shape}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if shape != (*z0.shape, channels):
        raise ValueError(
            f"`vector_field` returned shape {shape}, but the state has shape {z0.shape} and the "
            f"path has {channels} channels; return {(*z0.shape, channels)}. The time, and counts, "
            "are channels of the path."
        )


def _check_last_step(
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


def _check_inside(ts: Float[Array, " times"], control: AbstractControl) -> None:
    """The path stands still outside the data: nothing can be predicted there. It runs forwards."""
    if is_traced(ts, control.ts):
        return
    wanted, known = np.asarray(ts), (float(control.t0), float(control.t1))
    if wanted[-1] < wanted[0]:
        raise ValueError(
            f"`ts` decreases from {wanted[0]} to {wanted[-1]}, but a path runs forwards; give the "
            "times in increasing order: ts[::-1]."
        )
    if wanted.min() < known[0] or wanted.max() > known[1]:
        raise ValueError(
            f"`ts` runs from {wanted.min()} to {wanted.max()} but the path from {known[0]} to "
            f"{known[1]}: outside the data nothing drives the model. Leave these times out, or "
            "append a row of NaN at the last one to the series."
        )


def _cast(x: Any, dtype: jnp.dtype) -> Any:
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
