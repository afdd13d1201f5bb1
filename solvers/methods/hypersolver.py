r"""Hypersolvers: a learned correction of order p + 1 on a solver of order p.

    y1 = Psi_h(y0) + h^(p+1) g(t0, y0, f(t0, y0), h)

Psi_h is one step of any explicit solver, and g is trained to give what that step leaves out,

    R = (Phi_h(y0) - Psi_h(y0)) / h^(p+1),        Phi the flow, by a tight solve.

R is bounded as h -> 0, and so is g: the order stays p. If g misses R by a share d of its size, the error
of a step falls to that share. So the gain is at few steps, where evaluations of f are what costs, and as
much as g generalizes: only on states, and for the field, that it was trained on.

In code:    Psi -> `base`, g -> `correction(t, y, f, h, args)`, R -> `residual`
Cost:       that of the base, and one g a step. f(t0, y0) is a stage of the base: the compiler merges both.
Not for:    adaptive steps (there is no error estimate), many steps, a field that is still trained.
Reference:  Hypersolvers: Toward Fast Continuous-Depth Models (2020) | arXiv:2007.09601
"""

import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from nde.solvers.inputs import is_traced
from nde.solvers.methods.declared import AbstractDeclaring, Declared, declared_by


class Hypersolver(AbstractDeclaring, diffrax.AbstractSolver):
    """A solver with a learned correction; see the module for the equation.

    Args:
        base: An explicit `diffrax` solver of known order, such as `diffrax.Euler()`.
        correction: `correction(t, y, f, h, args)`, shaped like the state: y at t, f the rate there, h the
            signed length of the step. With one that is zero, the base to the last bit.
        trained_for: What `fingerprint(vector_field)` was when the correction was trained, for
            `check_field`.

    Raises:
        ValueError: for a base that is implicit or has no order for ODEs.
    """

    base: diffrax.AbstractSolver
    correction: Callable
    trained_for: str | None = eqx.field(default=None, static=True)

    def __check_init__(self) -> None:
        known = isinstance(self.base, diffrax.AbstractSolver)
        if not known or isinstance(self.base, diffrax.AbstractImplicitSolver):
            raise ValueError(
                f"`base` is {self.base!r}; it is an explicit diffrax solver, such as diffrax.Euler()."
            )
        if not callable(self.correction):
            raise ValueError(
                f"`correction` is {self.correction!r}; it is a function correction(t, y, f, h, args)."
            )

    @property
    def term_structure(self) -> Any:
        return self.base.term_structure

    @property
    def interpolation_cls(self) -> Any:
        return self.base.interpolation_cls

    @property
    def declared(self) -> Declared | None:
        """That of the base, begun anew in every step; the correction sees its first stage."""
        inner = declared_by(self.base)
        if inner is None:
            return None
        evaluations = inner.at_start + inner.evaluations
        return Declared(evaluations, evaluations, stability_limit=inner.stability_limit)

    def order(self, terms: diffrax.AbstractTerm) -> int | None:
        return self.base.order(terms)

    def init(self, terms: diffrax.AbstractTerm, t0: Any, t1: Any, y0: PyTree, args: Any) -> PyTree:
        return self.base.init(terms, t0, t1, y0, args)

    def step(
        self,
        terms: diffrax.AbstractTerm,
        t0: Any,
        t1: Any,
        y0: PyTree,
        args: Any,
        solver_state: PyTree,
        made_jump: Any,
    ) -> tuple:
        # What the base keeps for the next step it has at its own y1: as after a jump.
        del made_jump
        y1, _, info, state, result = self.base.step(terms, t0, t1, y0, args, solver_state, True)
        h = terms.contr(t0, t1)
        # In a solve that runs backward in time, t0 and t1 are those of its reversed clock.
        t, f = jnp.sign(h) * t0, terms.vf(t0, y0, args)
        power = h ** (self._order(terms) + 1)
        g = self.correction(t, y0, f, h, args)
        y1 = jax.tree.map(lambda y, c: y + (power * c).astype(y.dtype), y1, g)
        info = info | {"y1": y1} if "y1" in info else info
        return y1, None, info, state, result

    def func(self, terms: diffrax.AbstractTerm, t0: Any, y0: PyTree, args: Any) -> PyTree:
        return self.base.func(terms, t0, y0, args)

    def check_field(self, vector_field: PyTree) -> None:
        """Warn if a vector field is not the one that the correction was trained for.

        The models of `nde` ask it wherever there are numbers to look at, outside `jax.jit`; a solver inside
        `diffrax.diffeqsolve`, which is compiled, cannot.

        Args:
            vector_field: The field, or `diffrax.ODETerm` of it.
        """
        if self.trained_for is None or is_traced(vector_field):
            return
        if fingerprint(vector_field) != self.trained_for:
            warnings.warn(
                "The vector field is not the one that the correction was trained for: its parameters "
                "have changed. Train the correction again, or use the base solver.",
                stacklevel=2,
            )

    def residual(
        self,
        terms: diffrax.AbstractTerm,
        t0: Float[Array, ""],
        t1: Float[Array, ""],
        y0: PyTree[Float[Array, "..."]],
        args: Any = None,
        *,
        tolerance: float = 1e-8,
    ) -> PyTree[Float[Array, "..."]]:
        """What the correction is trained to give for the step from (t0, y0) to t1 > t0.

        Args:
            terms: `diffrax.ODETerm(vector_field)`.
            t0: Start of the step.
            t1: Its end.
            y0: State at `t0`.
            args: Passed to the vector field.
            tolerance: Of the tight solve, absolute and relative. In float32 not below 1e-6.

        Returns:
            R, shaped like the state.
        """
        flow = diffrax.diffeqsolve(
            terms,
            diffrax.Tsit5(),
            t0,
            t1,
            None,
            y0,
            args,
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        )
        state = self.base.init(terms, t0, t1, y0, args)
        y1 = self.base.step(terms, t0, t1, y0, args, state, True)[0]
        power = (t1 - t0) ** (self._order(terms) + 1)
        exact: Any = flow.ys
        return jax.tree.map(lambda exact, y: (exact[-1] - y) / power, exact, y1)

    def _order(self, terms: diffrax.AbstractTerm) -> int:
        order = self.base.order(terms)
        if order is None:
            raise ValueError(
                f"{type(self.base).__name__} has no order for ODEs; `base` is one that has, such as "
                "diffrax.Heun()."
            )
        return order


def fingerprint(vector_field: PyTree) -> str:
    """A short text that changes with any floating array of a vector field.

    A vector field that is a method of a model has the model's solver among its parts: that does not count.
    """
    is_solver = lambda x: isinstance(x, Hypersolver)
    arrays = eqx.filter(vector_field, eqx.is_inexact_array, is_leaf=is_solver)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(arrays):
        array = np.asarray(leaf)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return digest.hexdigest()[:16]
