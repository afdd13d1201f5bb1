r"""Mechanics: second-order, Hamiltonian, Lagrangian and port-Hamiltonian equations.

    second order       q' = v,         v' = a(t, q, v)
    Hamiltonian        q' = dH/dp,     p' = -dH/dq
    Lagrangian         q' = v,         M v' = dL/dq - (d2L/dv dq) v - d2L/dv dt + tau,   M = d2L/dv2
    port-Hamiltonian   x' = (J - R) dH/dx + G u,     J = A - A^T,     R = B B^T

H is kept by the exact flow of a Hamiltonian system, and so is the energy v dL/dv - L of a Lagrangian
one without time or force tau. A port-Hamiltonian system can only lose energy, but for what enters at
its ports: with the output y = G^T dH/dx,

    dH/dt = -(dH/dx)^T R (dH/dx) + y^T u  <=  y^T u.

The structure is in the equations, whatever the networks are. It survives the steps of a solver where
the solver is symplectic: `nde.solvers.StormerVerlet` or `Yoshida4`, with constant steps, for a
Hamiltonian that is `Separable` and for accelerations that do not depend on the velocity.

In code:    q, p, v -> the two halves of the state, a pair of arrays of shape (n,)
Needs:      twice differentiable networks (tanh, softplus), H and L up to three times under `grad`;
            coordinates and momenta of order one.
Not for:    data of positions and velocities with a Hamiltonian, whose p are momenta (mass times
            velocity, in the simplest case): use the Lagrangian or the second-order equation.
Reference:  Hamiltonian neural networks (2019) | arXiv:1906.01563
            Lagrangian neural networks (2020) | arXiv:2003.04630
            Port-Hamiltonian systems theory: an introductory overview (2014) | doi:10.1561/2600000002
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from nde._initial_value import AbstractODE
from nde._inputs import check_callable
from nde._solve import Rates
from nde.solvers.inputs import is_traced

__all__ = [
    "HamiltonianODE",
    "LagrangianODE",
    "OfPosition",
    "OfPositionAndVelocity",
    "PortHamiltonianODE",
    "Quadratic",
    "SecondOrderODE",
    "Separable",
]

Half = Float[Array, " n"]
Halves = tuple[Half, Half]


class OfPosition(eqx.Module):
    """A field of the position as an acceleration, which symplectic solvers can take:
    `acceleration(t, q, v, args) = field(t, q, args)`, such as an `nde.fields.MLPField(n, ...)`."""

    field: Callable

    def __call__(self, t: Array, q: Half, v: Half | None, args: PyTree[Any]) -> Half:
        """The acceleration, shape (n,)."""
        return self.field(t, q, args)


class OfPositionAndVelocity(eqx.Module):
    """A field of both as an acceleration: `acceleration(t, q, v, args) = field(t, [q, v], args)`, such
    as an `nde.fields.MLPField(2 * n, ..., out_size=n)`."""

    field: Callable

    def __call__(self, t: Array, q: Half, v: Half, args: PyTree[Any]) -> Half:
        """The acceleration, shape (n,)."""
        return self.field(t, jnp.concatenate([q, v]), args)


class Separable(eqx.Module):
    """H = T(p) + V(q), the form that symplectic solvers take.

    Args:
        kinetic: `kinetic(t, p, args) -> scalar`, such as `Quadratic` or an `nde.fields.ScalarField`.
        potential: `potential(t, q, args) -> scalar`.
    """

    kinetic: Callable
    potential: Callable

    def __call__(self, t: Array, q: Half, p: Half, args: PyTree[Any]) -> Float[Array, ""]:
        """H(t, q, p)."""
        return self.kinetic(t, p, args) + self.potential(t, q, args)


class Quadratic(eqx.Module):
    """The kinetic energy p^2 / (2 m), summed over the entries.

    Args:
        mass: A number or an array of shape (n,); of `nde.hybrid.Positive` its value is taken.

    Raises:
        ValueError: for a mass that is not positive.
    """

    mass: Any = 1.0

    def __check_init__(self):
        mass = getattr(self.mass, "value", self.mass)
        if eqx.is_array_like(mass) and not is_traced(mass) and not (np.asarray(mass) > 0).all():
            raise ValueError(f"`mass` is {mass}; a mass is positive.")

    def __call__(self, t: Array, p: Half, args: PyTree[Any]) -> Float[Array, ""]:
        """The energy at momentum p, shape (n,)."""
        mass = getattr(self.mass, "value", self.mass)
        return jnp.sum(p**2 / (2 * jnp.asarray(mass, p.dtype)))


class AbstractMechanics(AbstractODE):
    """A second-order system: the state is a pair of arrays of shape (n,)."""

    @abstractmethod
    def halves(self) -> tuple[Callable, Callable] | None:
        """The rate of each half as a field of the other half alone, or None where there is none."""

    def terms(self) -> PyTree[diffrax.AbstractTerm]:
        """One term, or for a symplectic solver a pair of them."""
        if not _takes_pairs(self.solver):
            return diffrax.ODETerm(Rates(self.vector_field))
        halves = self.halves()
        if halves is None:
            raise ValueError(
                f"`solver` is {type(self.solver).__name__}, for equations in which each half of the "
                f"state moves by the other alone; {type(self).__name__} is not such a one as it stands. "
                "Give HamiltonianODE a nde.mechanics.Separable, or use solver=diffrax.Tsit5()."
            )
        return tuple(diffrax.ODETerm(Rates(half)) for half in halves)

    def read(self, t: Array, y: Halves, args: PyTree[Any]) -> Halves:
        """The state as it is."""
        return y


def pair(model: AbstractMechanics, y0: Halves) -> Halves:
    """The state, if it is a pair of arrays of one shape."""
    shapes = [jnp.shape(x) for x in jax.tree.leaves(y0)]
    if not isinstance(y0, tuple) or len(y0) != 2 or len(shapes) != 2 or shapes[0] != shapes[1]:
        raise ValueError(
            f"`y0` has the shapes {shapes} in a {type(y0).__name__}; the state of "
            f"{type(model).__name__} is a pair (q, v) or (q, p) of arrays of one shape (n,)."
        )
    return y0


class SecondOrderODE(AbstractMechanics):
    """q'' = a(t, q, q'): positions and velocities in, positions and velocities out.

    Trajectories may cross in q, unlike those of a first-order equation.

    Args:
        acceleration: `acceleration(t, q, v, args)`, shape (n,). A symplectic solver hands over None for
            v: use `OfPosition`. A network of both is an `OfPositionAndVelocity`.
        solver: How one step is taken; also `nde.solvers.StormerVerlet` and `Yoshida4`.
        stepsize_controller: How long a step is, a `diffrax` step-size controller.
        adjoint: How gradients are taken.
        dt0: First step, in the unit of `ts`; `None` lets the controller choose.
        max_steps: Largest number of attempted steps of one solve.

    Raises:
        ValueError: for parts or numerics that can never work, and, at a call, for a state that is not a
            pair.

    Example:
        >>> field = nde.fields.MLPField(2, 32, 2, out_size=1, key=jax.random.key(0))
        >>> model = nde.SecondOrderODE(nde.mechanics.OfPositionAndVelocity(field))
        >>> qs, vs = model(ts, (q0, v0))                            # (times, 1) each
    """

    acceleration: Callable

    def __check_init__(self):
        check_callable("acceleration", self.acceleration, "(t, q, v, args)")

    def vector_field(self, t: Float[Array, ""], y: Halves, args: PyTree[Any]) -> Halves:
        """(v, a)."""
        q, v = y
        return v, self.acceleration(t, q, v, args)

    def lift(self, t: Float[Array, ""], y0: Halves, args: PyTree[Any]) -> Halves:
        """The state as it is given, if it is a pair."""
        return pair(self, y0)

    def halves(self) -> tuple[Callable, Callable]:
        """v, and the acceleration without it."""
        return _Same(), _WithoutVelocity(self.acceleration)


class HamiltonianODE(AbstractMechanics):
    """Hamilton's equations of a learned energy; see the module for the equations.

    Args:
        hamiltonian: `hamiltonian(t, q, p, args) -> scalar`; `Separable` for symplectic solvers. Of it
            only the derivatives matter: H is found up to a constant.
        solver: How one step is taken; also `nde.solvers.StormerVerlet` and `Yoshida4`.
        stepsize_controller: How long a step is, a `diffrax` step-size controller.
        adjoint: How gradients are taken.
        dt0: First step, in the unit of `ts`; `None` lets the controller choose.
        max_steps: Largest number of attempted steps of one solve.

    Raises:
        ValueError: for parts or numerics that can never work, and, at a call, for a state that is not a
            pair.

    Example:
        >>> V = nde.fields.ScalarField(1, 32, 2, key=jax.random.key(0))
        >>> H = nde.mechanics.Separable(nde.mechanics.Quadratic(), V)
        >>> steps = diffrax.ConstantStepSize()
        >>> model = nde.HamiltonianODE(H, solver=StormerVerlet(), stepsize_controller=steps, dt0=0.05)
        >>> qs, ps = model(ts, (q0, p0))
    """

    hamiltonian: Callable

    def __check_init__(self):
        check_callable("hamiltonian", self.hamiltonian, "(t, q, p, args)")

    def vector_field(self, t: Float[Array, ""], y: Halves, args: PyTree[Any]) -> Halves:
        """(dH/dp, -dH/dq)."""
        dq, dp = jax.grad(lambda y: _scalar("hamiltonian", self.hamiltonian(t, *y, args)))(y)
        return dp, -dq

    def lift(self, t: Float[Array, ""], y0: Halves, args: PyTree[Any]) -> Halves:
        """The state as it is given, if it is a pair."""
        return pair(self, y0)

    def halves(self) -> tuple[Callable, Callable] | None:
        """dT/dp and -dV/dq, if H is their sum."""
        if not isinstance(self.hamiltonian, Separable):
            return None
        return _Slope(self.hamiltonian.kinetic, 1.0), _Slope(self.hamiltonian.potential, -1.0)

    def energy(
        self, ts: Float[Array, " times"], ys: PyTree[Array], args: PyTree[Any] = None
    ) -> Float[Array, " times"]:
        """H along a trajectory `ys = model(ts, y0)`."""
        return jax.vmap(lambda t, y: self.hamiltonian(t, *y, args))(ts, ys)


class LagrangianODE(AbstractMechanics):
    """The Euler-Lagrange equations of a learned Lagrangian; see the module for the equations.

    Args:
        lagrangian: `lagrangian(t, q, v, args) -> scalar`. Its Hessian in v must not be singular: write
            v^T M(q) v / 2 - V(q) with M = B B^T + eps, or add eps v^2 / 2 to a network.
        force: `force(t, q, v, args)`, shape (n,): tau, friction and drive; None: no force.
        solver: How one step is taken, a `diffrax` solver.
        stepsize_controller: How long a step is, a `diffrax` step-size controller.
        adjoint: How gradients are taken.
        dt0: First step, in the unit of `ts`; `None` lets the controller choose.
        max_steps: Largest number of attempted steps of one solve.

    Raises:
        ValueError: for parts or numerics that can never work, and, at a call, for a state that is not a
            pair, or a mass matrix that is singular at its start.
    """

    lagrangian: Callable
    force: Callable | None = None

    def __check_init__(self):
        check_callable("lagrangian", self.lagrangian, "(t, q, v, args)")
        if self.force is not None:
            check_callable("force", self.force, "(t, q, v, args)")

    def vector_field(self, t: Float[Array, ""], y: Halves, args: PyTree[Any]) -> Halves:
        """(v, v')."""
        q, v = y
        momentum = lambda t, q, v: jax.grad(self._of, argnums=2)(t, q, v, args)
        # d/dt of dL/dv along (1, v, 0): what moves the momentum without an acceleration.
        along = (jnp.ones_like(t), v, jnp.zeros_like(v))
        _, carried = jax.jvp(momentum, (t, q, v), along)
        right = jax.grad(self._of, argnums=1)(t, q, v, args) - carried
        if self.force is not None:
            right = right + self.force(t, q, v, args)
        mass = lx.MatrixLinearOperator(self.mass_matrix(t, q, v, args))
        # A singular matrix gives inf or nan here, which the solve reports as such.
        found = lx.linear_solve(mass, right, lx.LU(), throw=False)
        return v, found.value

    def mass_matrix(
        self, t: Float[Array, ""], q: Half, v: Half, args: PyTree[Any] = None
    ) -> Float[Array, "n n"]:
        """M = d2L/dv2."""
        return jax.hessian(self._of, argnums=2)(t, q, v, args)

    def halves(self) -> None:
        """The acceleration depends on both."""
        return None

    def lift(self, t: Float[Array, ""], y0: Halves, args: PyTree[Any]) -> Halves:
        """The state as it is given, if it is a pair at which the mass matrix can be solved with."""
        q, v = pair(self, y0)
        mass = self.mass_matrix(t, q, v, args)
        if not is_traced(mass):
            condition = np.linalg.cond(np.asarray(mass))
            if not condition < 1 / np.finfo(mass.dtype).eps:
                raise ValueError(
                    f"`lagrangian` has a singular mass matrix d2L/dv2 at `y0` (condition "
                    f"{condition:.1e}): {np.asarray(mass).tolist()}. Add a kinetic energy in every "
                    "velocity, such as 1e-3 * jnp.sum(v**2)."
                )
        return q, v

    def _of(self, t: Array, q: Half, v: Half, args: PyTree[Any]) -> Float[Array, ""]:
        return _scalar("lagrangian", self.lagrangian(t, q, v, args))


class PortHamiltonianODE(AbstractODE):
    """Energy that is stored, moved, lost and exchanged; see the module for the equations.

    Each matrix is an array, or `matrix(t, x, args)`. (H, J, R) are not unique: H may be scaled, and J
    and R the other way. Fix one parameter of H to compare them.

    Args:
        hamiltonian: `hamiltonian(t, x, args) -> scalar` of the state x, shape (n,), such as
            an `nde.fields.ScalarField`.
        interconnection: A, shape (n, n): J = A - A^T.
        dissipation: B, shape (n, m): R = B B^T; None: no loss.
        ports: G, shape (n, inputs); None: a closed system.
        control: `control(t, args) -> u`, shape (inputs,), with `ports`.
        solver: How one step is taken, a `diffrax` solver.
        stepsize_controller: How long a step is, a `diffrax` step-size controller.
        adjoint: How gradients are taken.
        dt0: First step, in the unit of `ts`; `None` lets the controller choose.
        max_steps: Largest number of attempted steps of one solve.

    Raises:
        ValueError: for parts or numerics that can never work, and, at a call, for matrices that do not
            fit the state.

    Example:
        >>> A, B = jnp.array([[0.0, 1.0], [0.0, 0.0]]), jnp.array([[0.0], [0.1]])
        >>> H = nde.fields.ScalarField(2, 32, 2, key=jax.random.key(0))
        >>> xs = nde.PortHamiltonianODE(H, nde.hybrid.Frozen(A), B)(ts, x0)    # (times, 2)
    """

    hamiltonian: Callable
    interconnection: Any
    dissipation: Any = None
    ports: Any = None
    control: Callable | None = None

    def __check_init__(self):
        check_callable("hamiltonian", self.hamiltonian, "(t, x, args)")
        if self.control is not None:
            check_callable("control", self.control, "(t, args)")
        if (self.ports is None) != (self.control is None):
            raise ValueError(
                "`ports` and `control` go together: give G and control(t, args) -> u, or neither."
            )

    def terms(self) -> diffrax.ODETerm:
        """dx/dt = (J - R) dH/dx + G u."""
        return diffrax.ODETerm(Rates(self.vector_field))

    def vector_field(
        self, t: Float[Array, ""], x: Float[Array, " n"], args: PyTree[Any]
    ) -> Float[Array, " n"]:
        """dx/dt, shape (n,)."""
        effort = self.effort(t, x, args)
        A = self._matrix("interconnection", t, x, args)
        dx = A @ effort - A.T @ effort
        if self.dissipation is not None:
            B = self._matrix("dissipation", t, x, args)
            dx = dx - B @ (B.T @ effort)
        if self.ports is not None:
            dx = dx + self._matrix("ports", t, x, args) @ self._input(t, args)
        return dx

    def effort(
        self, t: Float[Array, ""], x: Float[Array, " n"], args: PyTree[Any] = None
    ) -> Float[Array, " n"]:
        """dH/dx, shape (n,)."""
        return jax.grad(lambda x: _scalar("hamiltonian", self.hamiltonian(t, x, args)))(x)

    def power(
        self, t: Float[Array, ""], x: Float[Array, " n"], args: PyTree[Any] = None
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """What is lost, (dH/dx)^T R (dH/dx) >= 0, and what enters at the ports, y^T u."""
        effort = self.effort(t, x, args)
        lost = entered = jnp.zeros((), x.dtype)
        if self.dissipation is not None:
            lost = jnp.sum((self._matrix("dissipation", t, x, args).T @ effort) ** 2)
        if self.ports is not None:
            outputs = self._matrix("ports", t, x, args).T @ effort
            entered = jnp.sum(outputs * self._input(t, args))
        return lost, entered

    def lift(
        self, t: Float[Array, ""], y0: Float[Array, " n"], args: PyTree[Any]
    ) -> Float[Array, " n"]:
        """The state as it is given, if the matrices fit it."""
        n = jnp.shape(y0)
        if not eqx.is_array(y0) or len(n) != 1:
            raise ValueError(
                f"`y0` is {jax.tree.map(jnp.shape, y0)}; it is one array of shape (n,)."
            )
        for name, square in (("interconnection", True), ("dissipation", False), ("ports", False)):
            if getattr(self, name) is None:
                continue
            shape = jax.eval_shape(lambda name=name: self._matrix(name, t, y0, args)).shape
            if len(shape) != 2 or shape[0] != n[0] or (square and shape[1] != n[0]):
                wanted = f"({n[0]}, {n[0] if square else 'any'})"
                raise ValueError(f"`{name}` has shape {shape}; for this state it is {wanted}.")
        return y0

    def read(
        self, t: Float[Array, ""], y: Float[Array, " n"], args: PyTree[Any]
    ) -> Float[Array, " n"]:
        """The state as it is."""
        return y

    def _matrix(self, name: str, t: Array, x: Array, args: PyTree[Any]) -> Array:
        part = getattr(self, name)
        part = getattr(part, "value", part)  # of a parameter of `nde.hybrid`
        return jnp.asarray(part(t, x, args) if callable(part) else part, x.dtype)

    def _input(self, t: Array, args: PyTree[Any]) -> Array:
        assert self.control is not None  # with `ports`
        return self.control(t, args)


class _Same(eqx.Module):
    """dq/dt = v."""

    def __call__(self, t: Array, v: Half, args: PyTree[Any]) -> Half:
        return v


class _WithoutVelocity(eqx.Module):
    """dv/dt = a(t, q), of an acceleration that does not look at v."""

    acceleration: Callable

    def __call__(self, t: Array, q: Half, args: PyTree[Any]) -> Half:
        try:
            return self.acceleration(t, q, None, args)
        except (TypeError, AttributeError) as error:
            raise ValueError(
                "`acceleration` looks at the velocity, which a symplectic solver hands over as None: "
                f"{str(error).splitlines()[0]} Use OfPosition(field), or solver=diffrax.Tsit5()."
            ) from error


class _Slope(eqx.Module):
    """The derivative of an energy by its half of the state, with a sign."""

    energy: Callable
    sign: float

    def __call__(self, t: Array, x: Half, args: PyTree[Any]) -> Half:
        return self.sign * jax.grad(lambda x: _scalar("hamiltonian", self.energy(t, x, args)))(x)


def _takes_pairs(solver: diffrax.AbstractSolver) -> bool:
    """Whether the solver wants one term for each half of the state."""
    structure = solver.term_structure
    return isinstance(structure, tuple) and len(structure) == 2


def _scalar(name: str, value: ArrayLike) -> Float[Array, ""]:
    if jnp.shape(value) != ():
        raise ValueError(
            f"`{name}` returned shape {jnp.shape(value)}; an energy is a scalar: jnp.sum(...), or a "
            "network such as nde.fields.ScalarField."
        )
    return jnp.asarray(value)
