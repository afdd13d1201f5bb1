r"""Integrals that ride along a solve, beside any terms and any controller.

    dy = (the terms),      dq = a(t, y, args) dt + b(t, y, args) . dW,      q(t0) = 0

The state becomes (y, q), so q has the order, the dense output and the gradient that y has. It takes
no part in what y does: the controller (and whatever asks it for tolerances or a norm, as implicit
solvers do) is shown y and the error of y, and so are the error and stiffness estimates. The steps are
those of a solve without q.

The increment of q needs dt. An `ODETerm` has it: a joins its vector field. Any other term gets it as
a second control, (X, t), unless an `ODETerm` stands beside it, as the drift beside a diffusion; then
its own control is left as the solver expects it, and moves q by b . dW alone.

In code:    a -> `integrand`    b -> `noise`, one more axis than q, for the channels of W
Cost:       that of a and b, at every evaluation of the field.
Not for:    pairs of terms (separable systems): neither field sees the whole state.
"""

import functools
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

Field = Callable[[Any, PyTree[Array], PyTree[Any]], PyTree[Any]]  # of (t, y, args)


def ride_along(
    terms: diffrax.AbstractTerm,
    y0: PyTree[Array],
    stepsize_controller: diffrax.AbstractStepSizeController,
    integrand: Field,
    *,
    t0: Any,
    args: PyTree[Any] = None,
    noise: Field | None = None,
) -> tuple[diffrax.AbstractTerm, tuple[PyTree[Array], PyTree[Array]], Any]:
    """Lets q = int `integrand` dt + int `noise` . dW ride along a solve, outside the error norm.

        terms, y0, controller = ride_along(terms, y0, controller, integrand, t0=t0, args=args)
        sol = diffrax.diffeqsolve(
            terms, solver, t0, t1, dt0, y0, args, stepsize_controller=controller
        )
        y, q = sol.ys

    Args:
        terms: An `ODETerm`, a `ControlTerm`, or a `MultiTerm`, as of drift and diffusion.
        y0: The state at `t0`, a PyTree of arrays.
        stepsize_controller: Any controller.
        integrand: a(t, y, args), an array or a PyTree of arrays. For t1 < t0 the integral has the
            sign of dt.
        t0: Start of the solve.
        args: Passed to `integrand` and `noise`, those of the solve.
        noise: b(t, y, args): for each array of q, of shape (...), an array of shape (..., channels)
            that is contracted with the increment of the one `ControlTerm` there is. Ito or
            Stratonovich as the solver has it. With SOSRI q has strong order 3/2 where each column of
            b depends on the component of y with the same noise alone, and 1/2 otherwise.

    Returns:
        The terms, the state (y0, q0) with q0 = 0, and the controller, to be given to `diffeqsolve`.
        The precision of q is that of `integrand`, at least that of the time.

    Raises:
        ValueError: for a pair of terms, an integrand that is not floating, a `noise` without the one
            `ControlTerm` that drives it, or one of another shape.
    """
    parts = list(terms.terms) if isinstance(terms, diffrax.MultiTerm) else [terms]
    if not all(isinstance(part, diffrax.AbstractTerm) for part in parts):
        raise ValueError(
            f"`terms` is a {type(terms).__name__}; an integral rides along one term or a MultiTerm. In "
            "a separable system neither field sees the whole state: integrate over saved states."
        )
    q0 = _zeros("integrand", integrand, t0, y0, args)
    drift = next((i for i, part in enumerate(parts) if isinstance(part, diffrax.ODETerm)), 0)
    driven = None if noise is None else _check_noise(noise, parts, t0, y0, args, q0)
    riding = []
    for i, part in enumerate(parts):
        rate = integrand if i == drift else None
        if isinstance(part, diffrax.ODETerm):
            riding.append(diffrax.ODETerm(_Beside(part.vector_field, rate)))
        else:
            riding.append(_RidingTerm(part, rate, noise if i == driven else None))
    adapts = isinstance(stepsize_controller, diffrax.AbstractAdaptiveStepSizeController)
    wrapper: Any = _AdaptsToState if adapts else _StepsOfState
    controller = wrapper(stepsize_controller)
    together = diffrax.MultiTerm(*riding) if isinstance(terms, diffrax.MultiTerm) else riding[0]
    return together, (y0, q0), controller


def riding(terms: PyTree[diffrax.AbstractTerm]) -> int:
    """How many integrals ride along: the state is (.., ((y, q1), q2), ..)."""
    leaves = jax.tree.leaves(terms, is_leaf=_rides)
    return 1 + riding(without_integral(terms)) if any(map(_rides, leaves)) else 0


def without_integral(terms: PyTree[diffrax.AbstractTerm]) -> PyTree[diffrax.AbstractTerm]:
    """The terms of y, without the integral that was added last."""
    return jax.tree.map(lambda x: _alone(x) if _rides(x) else x, terms, is_leaf=_rides)


def state_of(y: PyTree[Array], integrals: int) -> PyTree[Array]:
    """The state without that many integrals beside it."""
    for _ in range(integrals):
        y = y[0]
    return y


class _Beside(eqx.Module):
    """A vector field, and the rate of q beside it: zero without `integrand`."""

    vector_field: Field
    integrand: Field | None

    def __call__(self, t: Any, y: tuple[PyTree, PyTree], args: PyTree) -> tuple[PyTree, PyTree]:
        return self.vector_field(t, y[0], args), _rate(self.integrand, t, y, args)


class _RidingTerm(diffrax.AbstractTerm):
    """A term of y that moves q too: by `integrand` dt, with its control made (control, t), and by
    `noise` times its control.

    A field value is (that of y, the rate of q, b); the second is zero without `integrand`, the third
    None without `noise`.
    """

    term: diffrax.AbstractTerm
    integrand: Field | None
    noise: Field | None

    def vf(self, t: Array, y: PyTree[Array], args: PyTree[Any]):
        return self.term.vf(t, y[0], args), *self._rates(t, y, args)

    def contr(self, t0: Array, t1: Array, **kwargs):
        control = self.term.contr(t0, t1, **kwargs)
        return control if self.integrand is None else (control, t1 - t0)

    def prod(self, vf: PyTree[Array], control: PyTree[Array]):
        own, rate, b = vf
        return self.term.prod(own, self._own(control)), self._increment(rate, b, control)

    def vf_prod(self, t: Array, y: PyTree[Array], args: PyTree[Any], control: PyTree[Array]):
        dy = self.term.vf_prod(t, y[0], args, self._own(control))
        return dy, self._increment(*self._rates(t, y, args), control)

    def is_vf_expensive(self, t0: Array, t1: Array, y: PyTree[Array], args: PyTree[Any]):
        return self.term.is_vf_expensive(t0, t1, y[0], args)

    def _own(self, control):
        return control if self.integrand is None else control[0]

    def _rates(self, t, y, args):
        rate = _rate(self.integrand, t, y, args)
        if self.noise is None:
            return rate, None
        b = self.noise(t, y[0], args)
        return rate, jax.tree.map(lambda q, x: _cast(x, q.dtype), y[1], b)

    def _increment(self, rate, b, control):
        dq = rate  # zero, without the time to multiply it with
        if self.integrand is not None:
            dq = jax.tree.map(lambda a: a * jnp.asarray(control[1], a.dtype), rate)
        if b is None:
            return dq
        own = self._own(control)
        return jax.tree.map(lambda q, x: q + _contracted(x, own), dq, b)


class _AbstractStepsOfState(diffrax.AbstractStepSizeController):
    """A controller that is shown y, the error of y and the terms of y, and no integral."""

    controller: eqx.AbstractVar[diffrax.AbstractStepSizeController]

    def wrap(self, direction: Array):
        return type(self)(self.controller.wrap(direction))

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
    ):
        return self.controller.init(
            without_integral(terms), t0, t1, y0[0], dt0, args, func, error_order
        )

    def adapt_step_size(
        self,
        t0: Array,
        t1: Array,
        y0: PyTree[Array],
        y1_candidate: PyTree[Array],
        args: PyTree[Any],
        y_error: PyTree[Array] | None,
        error_order: Any,
        controller_state: PyTree[Array],
    ):
        error = None if y_error is None else y_error[0]
        return self.controller.adapt_step_size(
            t0, t1, y0[0], y1_candidate[0], args, error, error_order, controller_state
        )


class _StepsOfState(_AbstractStepsOfState):
    controller: diffrax.AbstractStepSizeController


class _AdaptsToState(_AbstractStepsOfState, diffrax.AbstractAdaptiveStepSizeController):
    controller: diffrax.AbstractAdaptiveStepSizeController

    @property
    def rtol(self):
        return self.controller.rtol

    @property
    def atol(self):
        return self.controller.atol

    @property
    def norm(self):
        return _NormOfState(self.controller.norm)


class _NormOfState(eqx.Module):
    """The norm of y, or of a field value of y."""

    inner: Any

    def __call__(self, y: PyTree[Array]) -> Array:
        return self.inner(y[0])


def _rides(x: Any) -> bool:
    if isinstance(x, diffrax.ODETerm):
        return isinstance(x.vector_field, _Beside)
    return isinstance(x, _RidingTerm)


def _alone(term: Any) -> diffrax.AbstractTerm:
    if isinstance(term, diffrax.ODETerm):
        return diffrax.ODETerm(term.vector_field.vector_field)
    return term.term


def _rate(integrand, t, y, args) -> PyTree[Array]:
    """The rate of q, in the precision of q; zero without an integrand."""
    if integrand is None:
        return jax.tree.map(lambda q: jnp.zeros(q.shape, q.dtype), y[1])
    return jax.tree.map(lambda q, a: _cast(a, q.dtype), y[1], integrand(t, y[0], args))


def _contracted(b: PyTree[Array], control: PyTree[Array]) -> Array:
    """b . dW, over all axes of dW."""
    parts = jax.tree.map(lambda x, w: jnp.tensordot(x, _cast(w, x.dtype), jnp.ndim(w)), b, control)
    return functools.reduce(jnp.add, jax.tree.leaves(parts))


def _cast(tree: PyTree[Array], dtype: jnp.dtype) -> PyTree[Array]:
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def _zeros(name: str, integrand: Field, t0: Any, y0: PyTree[Array], args: PyTree) -> PyTree[Array]:
    """q at `t0`."""
    time = jnp.result_type(t0)
    if not jnp.issubdtype(time, jnp.floating):
        time = jnp.result_type(float)

    def zeros(x: Array):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"`{name}` returned an array of dtype {x.dtype}; what is integrated must be real and "
                "floating: use .astype(float)."
            )
        return jnp.zeros(x.shape, jnp.promote_types(x.dtype, time))

    return jax.tree.map(zeros, eqx.filter_eval_shape(integrand, t0, y0, args))


def _check_noise(noise: Field, parts: list, t0, y0, args, q0: PyTree[Array]) -> int:
    """Which of the terms drives q, once `noise` fits its control."""
    found = [i for i, part in enumerate(parts) if isinstance(part, diffrax.ControlTerm)]
    if len(found) != 1:
        raise ValueError(
            f"`noise` was given, but there are {len(found)} terms with a control; it needs one, whose "
            "increments drive the integral: MultiTerm(ODETerm(drift), ControlTerm(diffusion, path))."
        )
    time = jnp.asarray(t0, float) if jnp.issubdtype(jnp.result_type(t0), jnp.integer) else t0
    control = eqx.filter_eval_shape(parts[found[0]].contr, time, time)
    b = eqx.filter_eval_shape(noise, t0, y0, args)
    needed = jax.tree.map(
        lambda q: jax.tree.map(lambda w: jax.ShapeDtypeStruct(q.shape + w.shape, q.dtype), control),
        q0,
    )
    shapes = lambda tree: [x.shape for x in jax.tree.leaves(tree)]
    if jax.tree.structure(b) != jax.tree.structure(needed) or shapes(b) != shapes(needed):
        raise ValueError(
            f"`noise` returned the shapes {shapes(b)}, but the integral and its control need "
            f"{shapes(needed)}: those of the integral and one more axis for the channels."
        )
    return found[0]
