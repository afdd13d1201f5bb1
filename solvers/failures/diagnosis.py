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
from nde.solvers.failures import jacobian
from nde.solvers.failures.causes import Found, judge
from nde.solvers.failures.repeat import End, Problem, known_tolerances
from nde.solvers.inputs import (
    FINER_TIMES,
    FINITE_TIMES,
    bad_tolerance,
    is_traced,
    run_time_message,
)

_REPLACED = ("saveat", "adjoint", "throw", "progress_meter")
_TIGHTER = 100
_LONGEST = 2**16  # steps of a repeated solve that had no bound


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Args:
        cause: `"bad_input"`, `"zero_step"`, `"tolerance"`, `"vector_field"`, `"jump"`, `"blow_up"`,
            `"precision"`, `"stiff"` or `"too_few_steps"`; `"unknown"` for a failure that is none of
            these; None where the solve succeeds.
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

    The solve is repeated with `DiscreteAdjoint`, a second time where the precision is in doubt or
    the steps may be too long, and the field is looked at where it stopped. It tells what is likely, by the
    rules of `nde.solvers.failures.causes`.

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
        raise ValueError(
            f"The solve cannot be repeated: {run_time_message(error) or error}"
        ) from error
    _check_concrete(end)
    t, steps = float(end.t), end.steps
    if diffrax.is_okay(end.result):
        message = f"Nothing failed: t={t:.6g} was reached after {steps} steps."
        return Diagnosis(None, t, None, steps, message, "")
    if steps == 0 and end.result == diffrax.RESULTS.dt_min_reached:
        return _diagnosis(_stuck(problem, "the first step"), t, 0, "No step was taken")
    found = _judged(problem, end)
    where = f"The solve stopped at t={t:.6g} of {float(t1):.6g} after {steps} steps"
    return _diagnosis(found, t, steps, where)


def _judged(problem: Problem, end: End) -> Found:
    """What `judge` finds; of steps that may be too long, in the same solve with shorter ones."""
    if problem.is_held(end):
        seen = f"`dtmin={problem.dtmin}` holds the steps above what the tolerances ask for"
        advice = "Lower `dtmin`, or loosen `rtol` and `atol`."
        return _shorter(problem.controlled(dtmin=None), seen, advice)
    found = judge(problem.looking_ahead(end), end)
    if found.cause == "blow_up" and problem.adapts:
        # Where a loose solve has left the solution, the field may lead away that the solution never meets.
        seen = f"the tolerances are too loose: with {_TIGHTER} times smaller ones it does not"
        advice = f"Divide `rtol` and `atol` by {_TIGHTER}."
        return _shorter(problem.tightened(_TIGHTER), seen, advice, found, end)
    if problem.endless and found.cause == "too_few_steps":
        advice = "Use more `max_steps`, if it ever happens."
        return found._replace(reason="the event has not happened", advice=advice)
    return found


def _shorter(
    problem: Problem, seen: str, advice: str, found: Any = None, before: End | None = None
) -> Found:
    """The cause with shorter steps; `found` if they do not lead further than `before`."""
    end = problem.run()
    if diffrax.is_okay(end.result):
        return Found("tolerance", None, seen, advice)
    if before is not None and abs(end.t - problem.t0) <= 1.05 * abs(before.t - problem.t0):
        return found
    truly = judge(problem.looking_ahead(end), end)
    reason = f"{seen}; with shorter ones it stops at t={float(end.t):.6g}, {truly.reason}"
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
    y0 = jacobian.vector(problem.y0)
    if not np.isfinite(y0).all():
        at = int(np.argmax(~np.isfinite(y0)))
        leaf = jacobian.entry(problem.y0, at)
        return _wrong(f"`y0{leaf}` is {y0[at]}", "A state must be finite.", f"y{leaf}")
    for name in ("t0", "dt0") if problem.endless else ("t0", "t1", "dt0"):
        t = getattr(problem, name)
        if t is not None and not jnp.isfinite(t):
            return _wrong(f"`{name}` is {t}", FINITE_TIMES)
    t0, dt0 = problem.t0, problem.dt0
    if problem.span > 0 and dt0 is not None and t0 + dt0 == t0:
        return _stuck(problem, f"`dt0={dt0}`")
    for path, covers in covered(problem.terms, t0, problem.t1):
        if not covers:
            own, asked = f"[{path.t0}, {path.t1}]", f"{t0} to {problem.t1}"
            reason = f"the Brownian path covers {own} but the solve goes from {asked}"
            return _wrong(reason, "Give the path the interval of the solve.")
    known = known_tolerances(problem.controller).items()
    worst = {name: float(np.max(x) if np.all(x >= 0) else np.min(x)) for name, x in known}
    wrong = bad_tolerance(worst)
    return None if wrong is None else _wrong(*wrong)


def _wrong(reason: str, advice: str, leaf: str | None = None) -> Found:
    return Found("bad_input", leaf, reason, advice)


def _stuck(problem: Problem, step: str) -> Found:
    t0 = np.asarray(problem.t0)
    spacing = f"whose spacing there is {np.spacing(np.abs(t0)):.2g}"
    reason = f"{step} does not move t0={t0} in {t0.dtype}, {spacing}"
    return Found("zero_step", None, reason, FINER_TIMES)
