"""What the models driven by a control path share: their interface, their checks and the solve.

    dz = F(z) dX,        F(z) of shape (state, channels), X a path of `nde.paths`.

Where X is smooth this is the ODE dz/dt = F(z) X'(t). Where its derivative jumps, at knots, a step
ends at each knot and takes increments of X: no stage of a step can see the piece after it.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from nde._inputs import applied, check_real, check_state, check_times
from nde._model import AbstractModel
from nde._solve import Rates, Stepping, in_one_precision, solve
from nde._steps import KnotSteps, check_last_step
from nde._times import check_spacing
from nde.paths import AbstractControl
from nde.solvers.inputs import check_count, is_traced


class AbstractCDE(AbstractModel):
    """Anything that is solved as dz = matrix(t, z, args) dX and read out.

    Args:
        causal: Whether to refuse paths that look ahead: for outputs along the series that must not
            know its future.
        steps_per_interval: Steps of equal length from each knot of the path to the next; `None`
            leaves the steps to `stepsize_controller`, and ends one at each knot where the
            derivative of the path jumps.
    """

    causal: bool = eqx.field(default=False, kw_only=True, static=True)
    steps_per_interval: int | None = eqx.field(default=1, kw_only=True, static=True)

    def __check_init__(self):
        if self.steps_per_interval is not None:
            hint = ", or None to let `stepsize_controller` choose the steps"
            check_count("steps_per_interval", self.steps_per_interval, hint)

    @abstractmethod
    def matrix(self, control: AbstractControl) -> Callable:
        """The vector field, `matrix(t, z, args) -> (state, channels)`, for paths such as this one."""

    @abstractmethod
    def initial_state(self, x: Float[Array, " channels"]) -> Float[Array, " state"]:
        """The hidden state at the first value of a path, `path.start`."""

    @abstractmethod
    def read(self, z: Float[Array, " state"], control: AbstractControl) -> PyTree[Array]:
        """The output of a hidden state."""

    def __call__(self, control: AbstractControl, args: PyTree[Any] = None) -> PyTree[Array]:
        """The output at the end of the path."""
        states: Any = self.solve(control, args=args).ys
        return self.read(states[-1], control)

    def trajectory(
        self,
        control: AbstractControl,
        ts: Float[Array, " times"] | None = None,
        args: PyTree[Any] = None,
    ) -> PyTree[Array]:
        """The outputs at `ts`, shape (times, ...); `None`: at the observations, or at the ends of the
        windows of log-signatures.

        In the padding of a series the last output repeats.
        """
        check_control(control, self.causal)
        states = self.solve(control, control.times if ts is None else ts, args).ys
        return jax.vmap(lambda z: self.read(z, control))(states)

    def solve(
        self,
        control: AbstractControl,
        ts: Float[Array, " times"] | None = None,
        args: PyTree[Any] = None,
        *,
        integrand: Callable | None = None,
        throw: bool = True,
    ) -> diffrax.Solution:
        """The same solve with its `.stats` and `.result`; `.ys` are the hidden states.

        Args:
            control: Path of the data, from `nde.paths`.
            ts: Times, shape (times,), inside the path and ordered; `None`: the end alone.
            args: Passed to the vector field.
            integrand: `integrand(t, z, args)`, arrays of any shape. `.ys` is then a pair, of the states
                and of its integral.
            throw: Whether a failed solve raises. If not, look at `.result`: `.ys` is inf at `ts`
                that were not reached, and with `ts=None` the state where the solve stopped.

        Raises:
            ValueError: if the path does not fit the model, `ts` is outside the data, or the last step
                is too short for the precision of the times (inside `jax.jit`, a RuntimeError).
        """
        check_control(control, self.causal)
        z0 = self.initial_state(control.start)
        return solve_cde(self, control, z0, ts, args, integrand=integrand, throw=throw)


def solve_cde(
    model: AbstractCDE,
    control: AbstractControl,
    z0: Float[Array, " state"],
    ts: Float[Array, " times"] | None,
    args: PyTree[Any],
    *,
    integrand: Callable | None = None,
    throw: bool,
) -> diffrax.Solution:
    """Check the input and solve dz = matrix(t, z, args) dX over the whole path.

    `.ys` is the state at `ts`, shape (times, state), or at the end alone, shape (1, state).
    """
    check_state(z0)
    if ts is not None:
        check_times(ts)
        check_spacing("ts", ts)
        _check_inside(ts, control)
    control, z0, ts = in_one_precision(control, z0, ts)
    matrix = model.matrix(control)
    check_matrix(matrix, control, z0, args)
    steps = stepping(model, control)
    if steps.stepsize_controller is not model.stepsize_controller:  # steps end at the knots
        z0 = check_last_step(z0, control.ts, model.steps_per_interval or 1)
    term = diffrax.ControlTerm(Rates(matrix), control)
    return solve(
        model,
        term.to_ode() if control.smooth else term,
        z0,
        t0=control.t0,
        t1=control.t1,
        args=args,
        saveat=diffrax.SubSaveAt(t1=True) if ts is None else diffrax.SubSaveAt(ts=ts),
        stepping=steps,
        integrand=integrand,
        throw=throw,
    )


def stepping(model: AbstractCDE, control: AbstractControl) -> Stepping:
    """How long the steps are, and how many there can be."""
    intervals = control.ts.shape[0] - 1
    if model.steps_per_interval is not None:
        knots = KnotSteps(control.ts, model.steps_per_interval)
        return Stepping(knots, None, model.steps_per_interval * intervals)
    controller, max_steps = model.stepsize_controller, model.max_steps
    if control.smooth:
        return Stepping(controller, model.dt0, max_steps)
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
    clipped = diffrax.ClipStepSizeController(controller, step_ts=control.ts)
    return Stepping(clipped, model.dt0, max_steps)


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
    columns = applied("vector_field", matrix, control.t0, z0, args)
    shape = jax.tree.map(jnp.shape, columns)
    if shape != (*z0.shape, channels):
        raise ValueError(
            f"`vector_field` returned shape {shape}, but the state has shape {z0.shape} and the "
            f"path has {channels} channels; return {(*z0.shape, channels)}. The time, and counts, "
            "are channels of the path."
        )
    check_real("vector_field", columns)


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
