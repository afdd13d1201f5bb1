"""Why a solve failed, as a value (`diagnose`) and as an exception (`SolveError`).

One message of diffrax, "the maximum number of solver steps was reached", hides many causes. Bad input is
seen here before the first step; `causes` tells the others apart by repeating the solve.
"""

import dataclasses
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from nde.solvers.adjoint.noise import covered
from nde.solvers.failures import jacobian as spectrum
from nde.solvers.failures.causes import Found, judge
from nde.solvers.failures.repeat import End, Problem, known_tolerances
from nde.solvers.inputs import is_traced, said

_REPLACED = ("saveat", "adjoint", "throw", "progress_meter")
_TIGHTER = 100
_LONGEST = 2**16  # steps of a repeated solve that had no bound


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Args:
        cause: `"initial_state"`, `"time_span"`, `"zero_step"`, `"tolerance"`, `"vector_field"`,
            `"blow_up"`, `"precision"`, `"stiff"` or `"too_few_steps"`; `"unknown"` for a failure that
            is none of these; None where the solve succeeds.
        t: The last time that was reached, in the unit of `t0`.
        leaf: The entry of the state that is to blame, such as `y['b'][1]`; None where none is.
        steps: Attempted steps, rejected ones included.
        message: What happened and what to do.
        advice: What to do.
    """

    cause: str | None
    t: float
    leaf: str | None
    steps: int
    message: str
    advice: str


class SolveError(RuntimeError):
    """A solve that failed, with what `diagnose` found; or, in training, too many of them.

    One that `nde.fit` raises also has the `model` as far as it was trained, and the `history`.

    Args:
        message: What happened and what to do.
        cause: As in `Diagnosis`, as are `t`, `leaf`, `steps` and `advice`.
        t: The last time that was reached.
        leaf: The entry of the state that is to blame.
        lane: Which example of a batch, where one is known.
        steps: Attempted steps.
        advice: What to do.
    """

    def __init__(
        self,
        message: str,
        *,
        cause: str | None = None,
        t: float | None = None,
        leaf: str | None = None,
        lane: int | None = None,
        steps: int | None = None,
        advice: str = "",
    ):
        super().__init__(message)
        self.cause, self.t, self.leaf, self.lane = cause, t, leaf, lane
        self.steps, self.advice = steps, advice


def diagnose(
    terms: PyTree[diffrax.AbstractTerm],
    solver: diffrax.AbstractSolver,
    t0: Any,
    t1: Any,
    dt0: Any,
    y0: PyTree[Array],
    args: PyTree[Any] = None,
    *,
    stepsize_controller: diffrax.AbstractStepSizeController = diffrax.ConstantStepSize(),
    max_steps: int | None = 4096,
    **options: Any,
) -> Diagnosis:
    """Why a solve fails: give it the arguments that `diffrax.diffeqsolve` was given.

    The solve is repeated with `DiscreteAdjoint`, a second time where the precision is in doubt or the
    solution seems to escape, and the field is looked at where it stopped. It tells what is likely, by
    the rules of `nde.solvers.failures.causes`.

    Args:
        terms: As in the solve; so are all that follow. One example, not a batch.
        solver: The solver.
        t0: Start.
        t1: End.
        dt0: First step, or None.
        y0: State at `t0`.
        args: Passed to the vector field.
        stepsize_controller: The step-size controller.
        max_steps: Largest number of attempted steps.
        options: What else was given; `saveat`, `adjoint`, `throw` and `progress_meter` have no influence.

    Returns:
        A `Diagnosis`. Print its `message`.

    Raises:
        ValueError: inside `jax.jit`, `jax.vmap` or `jax.grad`, where there are no numbers to look at,
            and for arguments that diffrax refuses (a Brownian path of its own that is too short).
    """
    options = {name: x for name, x in options.items() if name not in _REPLACED}
    probe = jnp.zeros(())  # inside jax.jit even a constant has no value
    _check_concrete((terms, solver, t0, t1, dt0, y0, args, stepsize_controller, options, probe))
    t0, t1, dt0, y0 = _promoted(t0, t1, dt0, y0)
    max_steps = _LONGEST if max_steps is None else max_steps
    problem = Problem(terms, solver, t0, t1, dt0, y0, args, stepsize_controller, max_steps, options)
    found = _bad_input(problem)
    if found is not None:
        return _diagnosis(found, float(t0), 0, "No step was taken")
    if dt0 is not None and dt0 * (t1 - t0) < 0:
        raise ValueError(f"`dt0` is {dt0}, but the solve goes from {t0} to {t1}. Change its sign.")
    try:
        end = problem.run()
    except eqx.EquinoxRuntimeError as error:
        raise ValueError(f"The solve cannot be repeated: {said(error) or error}") from error
    _check_concrete(end)
    t, steps = float(end.t), end.steps
    if diffrax.is_okay(end.result):
        message = f"Nothing failed: t={t:.6g} was reached after {steps} steps."
        return Diagnosis(None, t, None, steps, message, "")
    if steps == 0 and end.result == diffrax.RESULTS.dt_min_reached:
        return _diagnosis(_stuck(problem, "the first step"), t, 0, "No step was taken")
    where = f"The solve stopped at t={t:.6g} of {float(t1):.6g} after {steps} steps"
    seen = problem
    if problem.endless:  # look as far ahead as it came
        seen = dataclasses.replace(problem, t1=2 * end.t - problem.t0)
    found = judge(seen, end)
    if found.cause == "blow_up" and seen.adapts:
        found = _reconsidered(seen, end, found)
    if problem.endless and found.cause == "too_few_steps":
        advice = "Use more `max_steps`, if it ever happens."
        found = found._replace(reason="the event has not happened", advice=advice)
    return _diagnosis(found, t, steps, where)


def _reconsidered(problem: Problem, end: End, found: Found) -> Found:
    """Where a loose solve has left the solution, the field may lead away that the solution never meets."""
    tight = problem.tightened(_TIGHTER)
    further = tight.run()
    loose = f"the tolerances are too loose: with {_TIGHTER} times smaller ones"
    advice = f"Divide `rtol` and `atol` by {_TIGHTER}."
    if diffrax.is_okay(further.result):
        return Found("tolerance", None, f"{loose} it does not", advice)
    if abs(further.t - problem.t0) <= 1.05 * abs(end.t - problem.t0):
        return found
    truly = judge(tight, further)
    reason = f"{loose} it stops at t={float(further.t):.6g}, {truly.reason}"
    return truly._replace(reason=reason, advice=f"{advice} {truly.advice}")


def _diagnosis(found: Found, t: float, steps: int, where: str) -> Diagnosis:
    message = f"{where}: {found.reason}. {found.advice}"
    return Diagnosis(found.cause, t, found.leaf, steps, message, found.advice)


def _check_concrete(tree: Any) -> None:
    if is_traced(tree):
        raise ValueError(
            "`diagnose` was called inside jax.jit, jax.vmap or jax.grad, where there are no numbers to "
            "look at. Call it outside, with the example that failed: `y0[lane]` instead of `y0`."
        )


def _promoted(t0: Any, t1: Any, dt0: Any, y0: PyTree) -> tuple[Array, Array, Array | None, PyTree]:
    """Times of one dtype and a state of at least that, as diffrax makes them."""
    times = [t0, t1] if dt0 is None else [t0, t1, dt0]
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.result_type(*times)
        if not jnp.issubdtype(dtype, jnp.floating):
            dtype = jnp.result_type(float)
        y0 = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x, dtype)), y0)
    cast = [jnp.asarray(t, dtype) for t in times]
    return cast[0], cast[1], None if dt0 is None else cast[2], y0


def _bad_input(problem: Problem) -> Found | None:
    """What the arguments show by themselves."""
    y0 = spectrum.vector(problem.y0)
    if not np.isfinite(y0).all():
        at = int(np.argmax(~np.isfinite(y0)))
        leaf = spectrum.entry(problem.y0, at)
        reason = f"`y0{leaf}` is {y0[at]}"
        return Found("initial_state", f"y{leaf}", reason, "A state must be finite.")
    for name in ("t0", "dt0") if problem.endless else ("t0", "t1", "dt0"):
        t = getattr(problem, name)
        if t is not None and not jnp.isfinite(t):
            advice = (
                "Times must be finite. To run to a steady state, use a large `t1` and "
                "event=diffrax.Event(diffrax.steady_state_event())."
            )
            return Found("time_span", None, f"`{name}` is {t}", advice)
    t0, dt0 = problem.t0, problem.dt0
    if problem.span > 0 and dt0 is not None and t0 + dt0 == t0:
        return _stuck(problem, f"`dt0={dt0}`")
    for path, covers in covered(problem.terms, t0, problem.t1):
        if not covers:
            reason = (
                f"the Brownian path covers [{path.t0}, {path.t1}] but the solve goes from "
                f"{t0} to {problem.t1}"
            )
            return Found("time_span", None, reason, "Give the path the interval of the solve.")
    return _bad_tolerance(problem)


def _stuck(problem: Problem, step: str) -> Found:
    smallest = np.spacing(np.abs(np.asarray(problem.t0)))
    return Found(
        "zero_step", None,
        f"{step} does not move t0={problem.t0} in {problem.t0.dtype}, whose spacing there is "
        f"{smallest:.2g}",
        "Use a larger `dt0`, dt0=None with adaptive steps, float64 times, or shift the time so that it "
        "starts near 0.",
    )  # fmt: skip


def _bad_tolerance(problem: Problem) -> Found | None:
    known = known_tolerances(problem.controller)
    advice = "Typical values are rtol=1e-3, atol=1e-6."
    for name, value in known.items():
        if not np.all(value >= 0):
            return Found("tolerance", None, f"`{name}` is {value}", advice)
    if known and not any(np.any(value > 0) for value in known.values()):
        reason = "`rtol` and `atol` are both 0, which no step can meet"
        return Found("tolerance", None, reason, advice)
    return None
