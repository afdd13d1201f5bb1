r"""The causes of a failed solve, told apart by the step sizes and by the field where it stopped.

The repeated solve leaves `a` accepted steps, `r` rejected ones and its last state (t, y). There f is the
field and J = df/dy, growth and decay are the outermost rates of J along the direction of time
(`jacobian`), tau = |y| / |f|; h is the median of the last 20 steps, h_max the largest, s the interval of
stability of the method, `done` and `left` the parts of the span. The first that holds:

    unstable    fixed steps, decay h > s, decay > growth                              stiff
    undefined   f or J is not finite, y has not grown 1000-fold                       vector_field
    escape      f or J is not finite, or near overflow and growth |y| > |f| / 100,
                and y has; or collapsed, growth left > 30, growth tau > 1/2,
                tau < 1000 h, f(y + 3/2 tau f) . f > f . f                            blow_up
    ahead       collapsed, f(t + d, y + d f) is not finite for some d                 vector_field
    singular    collapsed, |f| done > 100 |y - y0|, not bound by decay                vector_field
    unresolved  collapsed, steps of at most 16 tol of a Brownian path                 precision
    imprecise   tolerance < 10 eps, and with 100 eps it ends or gets 3 times further  precision
    coarse      collapsed, 64 spacings of t are long for the field, |t| > 10 span     zero_step
    rounded     implicit solver, eps decay |y| > |f| / 10                             precision
    stiffness   decay h > 0.3 s, decay max(|y0|, |y|) / |f| > 50                      stiff
    jump        f changes by half of itself within 8 h, and still within h / 512      jump
    otherwise   not collapsed                                                         too_few_steps

Collapsed: r > 10 (a + 10), or h < 64 spacings of time, or h < 1e-4 h_max, or the solve did not use up its
steps. In an escape h follows tau down, and f still grows where it points: behind a pole of f, such as
that of 1 / (1 - y), it has the other sign. The numbers are not sharp: they separate the problems of
`tests/failing.py`.
"""

from functools import cached_property
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from nde.solvers.adjoint.noise import intervals
from nde.solvers.failures import jacobian
from nde.solvers.failures.repeat import End, Problem, known_tolerances
from nde.solvers.inputs import FINER_TIMES, USE_FLOAT64
from nde.solvers.methods.declared import declared_by

_DOMAIN = (
    "Look there for the root or logarithm of a negative number, a division by zero, an overflow."
)
_JUMPS = (
    "If the field jumps at known times, end a step there: "
    "diffrax.ClipStepSizeController(controller, jump_ts=...). If it jumps where the solution stays, "
    "make it continuous: tanh(y / width) for sign(y)."
)


class Found(NamedTuple):
    """A cause, the entry of the state to blame, what was seen, and what to do."""

    cause: str
    leaf: str | None
    reason: str
    advice: str


class Failure:
    """A failed solve and what the rules ask of it; of the field only where it is `known`."""

    def __init__(self, problem: Problem, end: End, known: bool):
        self.problem, self.end, self.limit = problem, end, stability_limit(problem.solver)
        lengths = end.lengths
        self.h = float(np.median(lengths[-20:])) if lengths.size else 0.0
        self.h_max = float(lengths.max()) if lengths.size else 0.0
        self.t, self.y = float(end.t), jacobian.vector(end.y)
        self.done = abs(self.t - float(problem.t0))
        self.left = problem.span - self.done
        self.spacing = float(jnp.finfo(problem.t0.dtype).eps) * abs(self.t)
        self.eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(end.y))
        self.largest = min(float(jnp.finfo(x.dtype).max) for x in jax.tree.leaves(end.y))
        self.exhausted = bool(end.result == diffrax.RESULTS.max_steps_reached)
        tiny = self.h <= max(64 * self.spacing, 1e-4 * self.h_max)
        stuck = end.rejected > 10 * (len(lengths) + 10)
        self.collapsed = (
            not self.exhausted or stuck or (problem.adapts and lengths.size > 0 and tiny)
        )
        # Steps to the end, were all as those so far.
        self.at_this_pace = end.steps * problem.span / _positive(self.done)
        self.size = float(np.max(np.abs(self.y), initial=0.0))  # of the largest entry
        if known:
            self.f = jacobian.vector(problem.field(self.t, end.y))
            self.growth, self.decay = problem.rates(end.t, end.y)
            self.fastest = int(np.argmax(np.abs(self.f)))  # the entry that moves fastest
            self.speed = float(np.abs(self.f[self.fastest]))
            # The time in which it moves by its own size.
            self.tau = float(np.abs(self.y[self.fastest]) / _positive(self.speed))
            # Whether decay bounds the steps, by the stability of an explicit method.
            self.bounds_steps = self.decay * self.h > 0.3 * self.limit

    @cached_property
    def has_grown(self) -> bool:
        """1000-fold, from where it started or from what it moves by."""
        t0, y0 = self.problem.t0, self.problem.y0
        start = np.max(np.abs(jacobian.vector(y0)), initial=0.0)
        f0 = np.abs(jacobian.vector(self.problem.field(t0, y0)))
        moved = np.max(f0, initial=0.0) * self.done
        return bool(self.size > 1e3 * (max(start, moved) or 1.0))

    def ahead(self, delta: float) -> PyTree[Array] | None:
        """f where the field points to, `delta` later; None where that overflows."""
        direction = self.problem.direction
        y = jacobian.tree_like(self.y + direction * delta * self.f, self.end.y)
        if not np.isfinite(jacobian.vector(y)).all():
            return None
        return self.problem.field(self.t + direction * delta, y)


def _positive(x: Any) -> Any:
    return np.maximum(x, np.finfo(np.float64).tiny)


def stability_limit(solver: diffrax.AbstractSolver) -> float:
    """Where the negative real axis leaves the region of stability; that of Euler's method if unknown."""
    declared = declared_by(solver)
    if declared is not None:
        return declared.stability_limit
    return np.inf if issubclass(type(solver), diffrax.AbstractImplicitSolver) else 2.0


# --- the rules -----------------------------------------------------------------------------------


@np.errstate(all="ignore")
def judge(problem: Problem, end: End) -> Found:
    """The first rule that holds."""
    known = jacobian.knows_rate(problem.terms, end.t, end.y, problem.args)
    failure = Failure(problem, end, known)
    looks = (_unstable, _undefined, _escape, _ahead, _singular)
    counts = (_imprecise, _coarse, _rounded, _stiffness, _jump)
    rules = (*looks, _unresolved, *counts) if known else (_unresolved,)
    for rule in (*rules, _otherwise):
        found = rule(failure)
        if found is not None:
            return found
    if not failure.exhausted:
        text = str(diffrax.RESULTS[end.result]).strip().rstrip(".")
        return Found("unknown", None, text, "Try smaller steps or another solver.")
    return Found("unknown", None, "the step size collapsed, the cause is unknown", _JUMPS)


def _unstable(x: Failure) -> Found | None:
    """Steps that are fixed and too long: the numbers explode, the solution does not."""
    problem, limit = x.problem, x.limit
    if problem.adapts or x.exhausted:
        return None
    for growth, decay in (problem.rates(problem.t0, problem.y0), (x.growth, x.decay)):
        if decay * x.h > limit and decay > growth:
            reason = f"stiff, and unstable at steps of {x.h:.3g} (fastest mode ≈ {-decay:.2g})"
            advice = f"Use steps below {limit / decay:.2g}"
            return Found("stiff", None, reason, advice + _implicit(problem, " with adaptive steps"))
    return None


def _undefined(x: Failure) -> Found | None:
    """f or J is not finite where the solve stands."""
    if x.has_grown:
        return None
    found = _not_finite(x, x.problem.field(x.t, x.end.y), x.t)
    if found is None:
        noise = jacobian.noise_at(x.problem.terms, x.end.t, x.end.y, x.problem.args)
        if not np.isfinite(jacobian.vector(noise)).all():
            reason = f"the noise coefficient is not finite at t={x.t:.6g}"
            return Found("vector_field", None, reason, _DOMAIN)
        if x.collapsed and np.isnan(x.growth):
            reason = f"the derivative of `vector_field` in y is not finite at t={x.t:.6g}"
            return Found("vector_field", None, reason, _DOMAIN)
    return found


def _not_finite(x: Failure, f: PyTree[Array] | None, t: float) -> Found | None:
    if f is None or np.isfinite(jacobian.vector(f)).all():
        return None
    values = jacobian.vector(f)
    at = int(np.argmax(~np.isfinite(values)))
    leaf = jacobian.entry(x.end.y, at)
    reason = f"`vector_field(t, y, args){leaf}` is {values[at]} at t={t:.6g}"
    return Found("vector_field", f"y{leaf}", reason, _DOMAIN)


def _escape(x: Failure) -> Found | None:
    """y leaves every bound at a finite time."""
    infinite = not np.isfinite(x.f).all() or np.isnan(x.growth)
    full = max(x.size, x.speed) > 1e-3 * x.largest and x.growth * x.size > 0.01 * x.speed
    if infinite or full:
        at = int(np.argmax(np.abs(x.y)))
        return _blow_up(x, at, x.t) if x.has_grown else None
    if x.has_grown and not x.problem.adapts and not x.exhausted:
        return _blow_up(x, x.fastest, x.t + x.problem.direction * x.tau)
    steep = x.growth * x.left > 30 and x.growth * x.tau > 0.5
    close = x.tau < 1000 * max(x.h, 64 * x.spacing)
    if not (x.collapsed and steep and close and _still_grows(x)):
        return None
    return _blow_up(x, x.fastest, x.t + x.problem.direction * x.tau)


def _still_grows(x: Failure) -> bool:
    there, scale = x.ahead(1.5 * x.tau), np.abs(x.f[x.fastest])
    unit = x.f / scale
    return there is None or bool(jacobian.vector(there) / scale @ unit > unit @ unit)


def _blow_up(x: Failure, at: int, when: float) -> Found:
    leaf = "y" + jacobian.entry(x.end.y, at)
    reason = (
        f"`{leaf}` grows without bound: it is {x.y[at]:.3g}, and infinite at about t={when:.6g}"
    )
    advice = "Bound the field, end before that time, or, if y is bounded, solve more accurately."
    return Found("blow_up", leaf, reason, advice)


def _ahead(x: Failure) -> Found | None:
    """f is not finite a little further on."""
    if not x.collapsed:
        return None
    span = x.problem.span
    furthest = min(max(0.1 * span, x.h_max), x.left)
    for delta in np.geomspace(min(1e-7 * span, furthest), furthest, 29):
        found = _not_finite(x, x.ahead(delta), x.t + x.problem.direction * delta)
        if found is not None:
            return found
    return None


def _singular(x: Failure) -> Found | None:
    """f is huge, and neither y nor J says why: f has a pole."""
    at, stiff = x.fastest, x.bounds_steps and x.decay > 2 * x.growth
    moved = np.abs(x.y[at] - jacobian.vector(x.problem.y0)[at]) + 10 * x.eps * np.abs(x.y[at])
    if stiff or not (x.collapsed and np.abs(x.f[at]) * x.done > 100 * moved):
        return None
    leaf = jacobian.entry(x.end.y, at)
    reason = f"`vector_field(t, y, args){leaf}` is {x.f[at]:.3g} at t={x.t:.6g}, a pole"
    return Found("vector_field", f"y{leaf}", reason, _DOMAIN)


def _unresolved(x: Failure) -> Found | None:
    """Steps as short as the leaves of a Brownian path, which knows no shorter ones."""
    for path in intervals(x.problem.terms):
        if x.collapsed and path.tol is not None and x.h <= 16 * float(path.tol):
            reason = f"the steps are as short as `tol`={path.tol} of the Brownian path"
            return Found("precision", None, reason, "Give the path a smaller `tol`.")
    return None


def _imprecise(x: Failure) -> Found | None:
    """Tolerances that the dtype of the state cannot resolve."""
    known = known_tolerances(x.problem.controller)
    if not known or np.max(known["rtol"]) + np.max(known["atol"]) / _positive(x.size) >= 10 * x.eps:
        return None
    end = x.problem.controlled(rtol=100 * x.eps).run()
    further = abs(float(end.t) - float(x.problem.t0)) > 3 * x.done
    if not (further or end.result == diffrax.RESULTS.successful):
        return None
    reason = f"`rtol={np.max(known['rtol']):.1e}` is below what the state can resolve"
    advice = f"The smallest usable value is {10 * x.eps:.1e}. For tighter ones {USE_FLOAT64}."
    return Found("precision", None, reason, advice)


def _coarse(x: Failure) -> Found | None:
    """Times so far from 0 that their spacing is a long step for the field."""
    needed = 0.1 / _positive(max(x.decay, x.growth, 1 / _positive(x.tau)))
    if not (x.collapsed and abs(x.t) > 10 * x.problem.span and 64 * x.spacing > needed):
        return None
    reason = f"times near {x.t:.3g} are {x.spacing:.2g} apart, too coarse for the field"
    return Found("zero_step", None, reason, FINER_TIMES)


def _rounded(x: Failure) -> Found | None:
    """Fast modes that turn the rounding of the state into a field of its own."""
    if np.isfinite(x.limit) or not x.eps * x.decay * x.size > 0.1 * x.speed:
        return None
    reason = f"`vector_field` is the rounding of the state, times {x.decay:.2g} (fastest mode)"
    return Found("precision", None, reason, f"Loosen the tolerances, or {USE_FLOAT64}.")


def _stiffness(x: Failure) -> Found | None:
    """Steps that stability bounds, and not the solution."""
    start = np.max(np.abs(jacobian.vector(x.problem.y0)), initial=0.0)
    tau = max(start, x.size) / _positive(x.speed)
    if not (x.bounds_steps and x.decay * tau > 50):
        return None
    # At the pace so far, which knows of rejections; or, after a quick start, at the limit.
    needed = rounded_up(max(x.at_this_pace, x.end.steps + x.decay * x.left / x.limit))
    rates = f"fastest mode ≈ {-x.decay:.2g}, {x.decay * tau:.0f} times faster than the solution"
    advice = f"Use `max_steps≈{needed}`" + _implicit(x.problem)
    return Found("stiff", None, f"stiff ({rates})", advice)


def _implicit(problem: Problem, how: str = "") -> str:
    """The other way out; for noise there is none."""
    noisy = any(map(jacobian.is_noise, jacobian.parts(problem.terms)))
    return "." if noisy else f", or an implicit solver: `diffrax.Kvaerno5()`{how}."


def _jump(x: Failure) -> Found | None:
    """f is not continuous where the solution goes: no step is short enough."""
    if not (x.exhausted and x.problem.adapts and x.h > 0):
        return None

    at = lambda delta: (delta, jacobian.vector(x.ahead(delta)))
    change = lambda start, end: np.max(np.abs(end[1] - start[1]))
    if x.ahead(8 * x.h) is None:
        return None
    start, end = (0.0, x.f), at(8 * x.h)
    if not change(start, end) > 0.5 * np.max(np.abs(x.f)):
        return None
    for _ in range(12):
        middle = at((start[0] + end[0]) / 2)
        first = change(start, middle) > change(middle, end)
        start, end = (start, middle) if first else (middle, end)
    if not change(start, end) > 0.25 * np.max(np.abs(x.f)):
        return None
    when = x.t + x.problem.direction * end[0]
    return Found("jump", None, f"`vector_field` jumps at about t={when:.6g}", _JUMPS)


def _otherwise(x: Failure) -> Found | None:
    """Nothing is wrong but the number of steps."""
    if x.collapsed:
        return None
    if not x.done:
        return Found("too_few_steps", None, "no step was accepted yet", "Use `max_steps≈4096`.")
    reason = f"{x.done / x.problem.span:.0%} of the span was reached"
    if not x.problem.adapts:
        advice = f"Use `max_steps≈{rounded_up(x.at_this_pace)}`, or longer steps."
        return Found("too_few_steps", None, reason, advice)
    # Beyond a hundred times of what was seen, steps have other lengths.
    needed = rounded_up(min(x.at_this_pace, 100 * x.end.steps))
    advice = f"Use `max_steps≈{needed}`, looser tolerances, or a solver of higher order."
    return Found("too_few_steps", None, reason, advice)


def rounded_up(number: float) -> int:
    """To two digits."""
    unit = 10 ** max(0, int(np.floor(np.log10(max(number, 1)))) - 1)
    return int(np.ceil(number / unit)) * unit
