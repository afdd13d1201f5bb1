r"""What the models of stochastic differential equations share: noise, calculus and the solve.

    dX = mu(t, X, args) dt + sigma(t, X, args) dW        Ito, or "o dW", Stratonovich

The model says in which calculus its equation is written; a solver converges to the solution in one of
them. Where they differ the drift is changed, exactly, by the derivative of the diffusion:

    mu_Ito = mu_Stratonovich + c,      c = 1/2 sum_j (D sigma_j) sigma_j,      sigma_j = sigma e_j

    diagonal    sigma_j = sigma_j(X) e_j       c_i = 1/2 sigma_i d sigma_i / d X_i
    scalar      one column                     c = 1/2 (D sigma) sigma
    additive    sigma(t)                       c = 0: the two calculi agree
    general     a matrix                       the sum

A step ends at each of the times; the steps between are of equal length, one draw each, or adaptive,
with a tree of noise. `ts` may repeat its last value (padding).

In code:    mu, sigma -> drift, diffusion    c -> `correction`
Cost:       of the change, one jvp of the diffusion for each channel of noise, wherever the drift is
            evaluated.
Reference:  Numerical solution of stochastic differential equations, 4.9 (1992, Kloeden and Platen)
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from nde._inputs import (
    applied,
    check_first_step,
    check_key,
    check_real,
    check_state,
    check_times,
    check_vector_field,
)
from nde._model import AbstractModel
from nde._solve import Rates, Stepping, in_one_precision, solve
from nde._steps import KnotNoise, KnotSteps, check_last_step
from nde._times import check_spacing
from nde.solvers import BrownianInterval, LevyHeun, SpaceSpaceLevyArea
from nde.solvers.inputs import check_count, is_traced
from nde.solvers.methods.sosri import AbstractSRI

Noise = Literal["diagonal", "scalar", "additive", "general"]
Calculus = Literal["ito", "stratonovich"]
State = Float[Array, "*state"]
# Step ends that an adaptive solve comes back to after a rejection, at most so many at a time.
REJECTED = 100


class AbstractSDE(AbstractModel):
    """Anything that is solved as dX = mu dt + sigma dW.

    Args:
        noise_type: How the diffusion acts on the noise. `"diagonal"`: it has the shape of the state,
            and a noise for every entry. `"scalar"`: it has the shape of the state, and one noise for
            all. `"general"`: it has one more axis, of the channels of the noise. `"additive"`: it does
            not depend on the state, and is shaped as `"diagonal"` or `"general"`.
        calculus: `"ito"` or `"stratonovich"`, in which the equation is written. It is changed to that
            of the solver.
        steps_per_interval: Steps of equal length from each time of `ts` to the next; `None` leaves
            them to `stepsize_controller`, which must be adaptive.
    """

    noise_type: eqx.AbstractVar[Noise]
    calculus: eqx.AbstractVar[Calculus]
    steps_per_interval: int | None = eqx.field(default=1, kw_only=True, static=True)
    solver: diffrax.AbstractSolver = eqx.field(default=diffrax.Heun(), kw_only=True)

    def __check_init__(self):
        check_choice("noise_type", self.noise_type, Noise)
        check_choice("calculus", self.calculus, Calculus)
        if self.steps_per_interval is not None:
            hint = ", or None to let `stepsize_controller` choose the steps"
            check_count("steps_per_interval", self.steps_per_interval, hint)
        if isinstance(self.solver, diffrax.AbstractSolver) and not isinstance(self.solver, type):
            calculus_of(self.solver)


def solve_sde(
    model: AbstractSDE,
    drift: Callable,
    diffusion: Callable,
    ts: Float[Array, " times"],
    y0: State,
    args: PyTree[Any],
    *,
    key: PRNGKeyArray,
    integrand: Callable | None = None,
    noise: Callable | None = None,
    throw: bool,
) -> diffrax.Solution:
    """Check the input and solve from `ts[0]` to `ts[-1]`; `.ys` are the states at `ts`.

    With `integrand` (and `noise`, its stochastic part) a pair: those, and the integral.
    """
    check_times_of_noise(ts, model.dt0)
    check_key(key)
    check_one_array(y0)
    ts, y0 = in_one_precision(ts, y0)
    check_vector_field(drift, ts[0], y0, args, "drift")
    noisy: Any = Diffusion(diffusion, model.noise_type)
    shape = noisy.noise_shape(ts[0], y0, args)
    drift = in_calculus_of(model, drift, noisy, ts[0], y0, args)
    steps, path = stepping(model, ts, shape, key)
    if isinstance(path, KnotNoise):
        y0 = check_last_step(y0, ts, path.steps)
    return solve(
        model,
        diffrax.MultiTerm(diffrax.ODETerm(Rates(drift)), diffrax.ControlTerm(noisy, path)),
        y0,
        t0=ts[0],
        t1=ts[-1],
        args=args,
        saveat=diffrax.SubSaveAt(ts=ts),
        stepping=steps,
        integrand=integrand,
        noise=noise,
        throw=throw,
    )


def stepping(
    model: AbstractSDE, ts: Float[Array, " times"], shape: tuple[int, ...], key: PRNGKeyArray
) -> tuple[Stepping, diffrax.AbstractBrownianPath]:
    """How long the steps are, and the noise over them."""
    area, intervals = levy_area_of(model.solver), ts.shape[0] - 1
    if model.steps_per_interval is not None:
        steps = model.steps_per_interval
        path = KnotNoise(ts, steps, shape, key, area)
        return Stepping(KnotSteps(ts, steps), None, steps * intervals), path
    controller = model.stepsize_controller
    if not isinstance(controller, diffrax.AbstractAdaptiveStepSizeController):
        raise ValueError(
            f"`stepsize_controller` is {type(controller).__name__}, and `steps_per_interval` is None. "
            "Use `steps_per_interval=1` for equal steps, or "
            "`stepsize_controller=diffrax.PIDController(rtol=1e-2, atol=1e-3)` for adaptive ones."
        )
    if model.max_steps is not None and model.max_steps < intervals:
        raise ValueError(
            f"`max_steps` is {model.max_steps} but a step ends at each of the {intervals + 1} times; "
            f"give at least {4 * intervals}."
        )
    # The noise that made a step fail must not be forgotten: later steps end where that one did.
    clipped = diffrax.ClipStepSizeController(controller, step_ts=ts, store_rejected_steps=REJECTED)
    noise = jax.ShapeDtypeStruct(shape, ts.dtype)
    path = BrownianInterval(ts[0], ts[-1], noise, key, levy_area=area)
    return Stepping(clipped, model.dt0, model.max_steps), path


class Diffusion(eqx.Module):
    """A diffusion in the form that a solver multiplies with the noise."""

    field: Callable
    noise_type: Noise = eqx.field(static=True)

    def __call__(self, t: Array, y: State, args: PyTree[Any]) -> Any:
        sigma = jnp.asarray(self.field(t, y, args), y.dtype)
        is_diagonal = self.noise_type != "scalar" and sigma.shape == y.shape
        return lx.DiagonalLinearOperator(sigma) if is_diagonal else sigma

    def times(self, t: Array, y: State, args: PyTree[Any], dw: Array) -> State:
        """sigma(t, y, args) dw."""
        sigma = self(t, y, args)
        if isinstance(sigma, lx.DiagonalLinearOperator):
            return sigma.mv(dw)
        return jnp.tensordot(sigma, dw, axes=dw.ndim)

    def noise_shape(self, t: Array, y: State, args: PyTree[Any]) -> tuple[int, ...]:
        """The shape of the noise, once the diffusion fits its type."""
        sigma = applied("diffusion", self.field, t, y, args)
        is_operator = isinstance(sigma, lx.AbstractLinearOperator)
        if is_operator or not (eqx.is_array_like(sigma) or isinstance(sigma, jax.ShapeDtypeStruct)):
            raise ValueError(
                f"`diffusion` returned a {type(sigma).__name__}; return one array, and say with "
                "`noise_type` how it acts on the noise."
            )
        check_real("diffusion", sigma)
        got, like = jnp.shape(sigma), y.shape
        alike, matrix = got == like, len(got) == len(like) + 1 and got[:-1] == like
        shape = like if alike else got[-1:]
        fits = {
            "diagonal": (alike, f"{like}, a noise for every entry"),
            "scalar": (alike, f"{like}, with one noise for all"),
            "additive": (alike or matrix, f"{like}, or {(*like, 'noise')}"),
            "general": (matrix, f"{(*like, 'noise')}, a column for each channel of the noise"),
        }
        fit, needed = fits[self.noise_type]
        if not fit:
            raise ValueError(
                f"`diffusion` returned shape {got} for a state of shape {like}, but `noise_type` is "
                f'"{self.noise_type}": return shape {needed}, or state another `noise_type`.'
            )
        if self.noise_type == "additive" and self._sees_the_state(t, y, args):
            raise ValueError(
                '`noise_type` is "additive", but `diffusion` depends on the state. State "diagonal" or '
                '"general", or let it depend on t and args alone.'
            )
        return () if self.noise_type == "scalar" else shape

    def _sees_the_state(self, t: Array, y: State, args: PyTree[Any]) -> bool:
        # A tangent that is None is zero whatever the numbers are.
        def tangent(y):
            field = lambda y: self.field(t, y, args)
            return eqx.filter_jvp(field, (y,), (jnp.ones_like(y),))[1]

        return bool(jax.tree.leaves(eqx.filter_eval_shape(tangent, y)))


class Changed(eqx.Module):
    """The drift of the same equation in the other calculus: mu + sign c."""

    drift: Callable
    diffusion: Diffusion
    sign: float = eqx.field(static=True)

    def __call__(self, t: Array, y: State, args: PyTree[Any]) -> State:
        change = correction(self.diffusion, t, y, args)
        return jnp.asarray(self.drift(t, y, args), y.dtype) + self.sign * change


def correction(diffusion: Diffusion, t: Array, y: State, args: PyTree[Any]) -> State:
    """c = 1/2 sum_j (D sigma_j) sigma_j at one state."""

    def along(channel: Array) -> State:
        column = lambda y: diffusion.times(t, y, args, channel)
        return jax.jvp(column, (y,), (column(y),))[1]

    shape = diffusion.noise_shape(t, y, args)
    if shape == ():
        return along(jnp.ones((), y.dtype)) / 2
    size = int(np.prod(shape))
    channels = jnp.eye(size, dtype=y.dtype).reshape(size, *shape)
    return jnp.sum(jax.vmap(along)(channels), axis=0) / 2


def in_calculus_of(
    model: AbstractSDE,
    drift: Callable,
    diffusion: Diffusion,
    t: Array,
    y: State,
    args: PyTree[Any],
) -> Callable:
    """The drift with which the solver of the model converges to the equation of the model."""
    wanted = calculus_of(model.solver)
    if wanted == model.calculus or model.noise_type == "additive":
        return drift
    changed = Changed(drift, diffusion, 1.0 if wanted == "ito" else -1.0)
    try:
        eqx.filter_eval_shape(changed, t, y, args)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f'`calculus` is "{model.calculus}" but the `solver`, {type(model.solver).__name__}, is for '
            f'"{wanted}", and the drift between them needs the derivative of `diffusion`, which has '
            f"none: {str(error).splitlines()[0]} Use a solver of that calculus, diffrax.Euler() (Ito) or "
            "diffrax.Heun() (Stratonovich), or write the equation in the other."
        ) from error
    return changed


def in_ito_form(
    model: AbstractSDE, drift: Callable, diffusion: Callable
) -> tuple[Callable, Callable]:
    """The drift of the Ito equation, and a diffusion whose shape says the noise: like the state, a noise
    of its own for each entry; with one more axis, noises that mix.
    """
    noisy = Diffusion(diffusion, model.noise_type)
    if model.calculus == "stratonovich" and model.noise_type != "additive":
        drift = Changed(drift, noisy, 1.0)
    return drift, _AsColumn(diffusion) if model.noise_type == "scalar" else diffusion


class _AsColumn(eqx.Module):
    field: Callable

    def __call__(self, t: Array, y: State, args: PyTree[Any]) -> Array:
        return self.field(t, y, args)[..., None]


def calculus_of(solver: diffrax.AbstractSolver) -> Calculus:
    """To which solution the solver converges, which its class says."""
    if isinstance(solver, diffrax.AbstractItoSolver):
        return "ito"
    if isinstance(solver, diffrax.AbstractStratonovichSolver):
        return "stratonovich"
    raise ValueError(
        f"`solver` is {type(solver).__name__}(), which converges to neither the Ito nor the "
        "Stratonovich solution. Use diffrax.Heun() or nde.solvers.ReversibleHeun() (Stratonovich), "
        "diffrax.Euler() or nde.solvers.SOSRI() (Ito); the equation is changed to their calculus."
    )


def levy_area_of(solver: diffrax.AbstractSolver) -> Any:
    """What increments of noise the solver asks for."""
    while issubclass(type(solver), diffrax.AbstractWrappedSolver):
        solver = solver.solver  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(solver, LevyHeun):
        return SpaceSpaceLevyArea
    if isinstance(solver, AbstractSRI | diffrax.AbstractSRK):
        return diffrax.SpaceTimeLevyArea
    return diffrax.BrownianIncrement


def check_times_of_noise(ts: Float[Array, " times"], dt0: float | None) -> None:
    """`ts`: increasing times, at least two; the last may repeat."""
    check_times(ts)
    if ts.size < 2:
        raise ValueError(
            "`ts` has one time; a path runs from the first to the last of at least two, and starts at "
            "the first."
        )
    check_first_step(ts, dt0)
    check_spacing("ts", ts)
    if is_traced(ts):
        return
    times = np.asarray(ts)
    if times[-1] <= times[0]:
        raise ValueError(
            f"`ts` runs from {times[0]} to {times[-1]}; a stochastic equation runs forwards in time: "
            "give increasing times."
        )
    still = np.flatnonzero((np.diff(times) == 0) & (times[1:] < times[-1]))
    if still.size:
        at = int(still[0])
        raise ValueError(
            f"`ts` repeats {times[at]} at index {at + 1}; only the last time may repeat (padding). "
            "Leave repeated times out."
        )


def check_one_array(y0: Any) -> None:
    """`y0`: one floating array that is finite and not empty."""
    if not eqx.is_array(y0):
        raise ValueError(
            f"`y0` is a {type(y0).__name__}; the state of a stochastic equation is one array: "
            "y0=jnp.asarray(y0)."
        )
    check_state(y0)


def check_choice(name: str, value: Any, choices: Any) -> None:
    """`value` is one of the strings of a Literal."""
    if value not in get_args(choices):
        listed = ", ".join(f'"{choice}"' for choice in get_args(choices))
        raise ValueError(f"`{name}` is {value!r}; choose one of {listed}.")
