r"""Continuous normalizing flows: the law that an ODE makes of a simple one, its density and its samples.

    x' = f(t, x, args),    x(0) ~ base,    x(1) ~ the law of the model
    log p(x) = log base(x(0)) - int_0^1 div f(t, x(t)) dt,    where x(1) = x

A sample is one solve forwards, a density one solve backwards, on which the divergence rides along
(`nde.solvers.ride_along`): it takes no part in the choice of steps. The trace of J = df/dx costs

    exact         sum_i e_i^T J e_i                                                   d products J v
    Hutchinson    mean_j s_j^T J s_j,    signs s_j at random                          n products
    Hutch++       tr Q^T J Q + mean_j s_j^T P J P s_j,    P = 1 - Q Q^T               2 r + n products

where Q is an orthonormal basis of J times r random vectors. Both estimates are unbiased whatever Q is,
and so is their gradient with Q held fixed. With S the symmetric part of J the variance of Hutchinson's
is 2 (|S|^2 - |diag S|^2) / n, Frobenius norms; that of Hutch++ is the same of P J P, small where J is
nearly of rank r. Random vectors are drawn once per solve: the field must not change between steps.

In code:    f -> `vector_field`, div f -> `trace`; e, s -> rows of `noise`, one per product
Memory:     constant in the number of steps with `adjoint=nde.solvers.ReversibleAdjoint()` and a
            reversible solver.
Not for:    choosing a model by an estimated trace: use `Exact()` there. Modes that are far apart: a
            flow joins them by thin filaments.
Reference:  FFJORD: Free-form continuous dynamics for scalable reversible generative models (2019)
            | arXiv:1810.01367
            Hutch++: Optimal stochastic trace estimation (2021) | arXiv:2010.09649
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from nde._initial_value import AbstractODE
from nde._inputs import check_key
from nde._solve import Rates
from nde.fields import Batched
from nde.solvers.inputs import check_count, is_traced

__all__ = ["CNF", "Exact", "HutchPlusPlus", "Hutchinson", "Normal", "one_hot", "straightness"]

Point = Float[Array, " size"]
Products = Callable[[Float[Array, "count size"]], Float[Array, "count size"]]  # rows v -> rows J v


class Normal(eqx.Module):
    """The standard normal law in `size` dimensions.

    Any other base is an object with `sample(key)`, an array of shape (size,), and `log_prob(x)`.
    """

    size: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("size", self.size, ", the number of dimensions")

    def sample(self, key: PRNGKeyArray) -> Point:
        """One draw, shape (size,)."""
        return jax.random.normal(key, (self.size,))

    def log_prob(self, x: Point) -> Float[Array, ""]:
        """log density at `x`, in nats."""
        return -0.5 * (jnp.sum(x**2) + self.size * jnp.log(2 * jnp.pi).astype(x.dtype))


class AbstractTrace(eqx.Module):
    """How the trace of a Jacobian J is found from products J v."""

    @abstractmethod
    def draw(self, key: PRNGKeyArray | None, x: Point) -> PyTree[Array]:
        """The random vectors of one solve."""

    @abstractmethod
    def __call__(self, products: Products, noise: PyTree[Array]) -> Float[Array, ""]:
        """The trace, from the rows J v of any rows v."""


class Exact(AbstractTrace):
    """The trace itself, by one product per dimension: for small dimensions, and to report."""

    def draw(self, key: PRNGKeyArray | None, x: Point) -> Float[Array, "size size"]:
        """The unit vectors: nothing is drawn."""
        return jnp.eye(x.size, dtype=x.dtype)

    def __call__(self, products: Products, noise: Float[Array, "size size"]) -> Float[Array, ""]:
        """The trace."""
        return jnp.trace(products(noise))


class Hutchinson(AbstractTrace):
    """The mean of s^T J s over `probes` vectors s of random signs."""

    probes: int = eqx.field(default=1, static=True)

    def __check_init__(self):
        check_count("probes", self.probes)

    def draw(self, key: PRNGKeyArray | None, x: Point) -> Float[Array, "probes size"]:
        """The signs."""
        return _signs(key, self.probes, x)

    def __call__(self, products: Products, noise: Float[Array, "probes size"]) -> Float[Array, ""]:
        """The estimate."""
        return _quadratic(products, noise)


class HutchPlusPlus(AbstractTrace):
    """The trace of J on the range of J times `rank` random vectors, and Hutchinson's estimate with
    `probes` vectors of the rest: for Jacobians with a few large directions."""

    rank: int = eqx.field(default=1, static=True)
    probes: int = eqx.field(default=1, static=True)

    def __check_init__(self):
        check_count("rank", self.rank)
        check_count("probes", self.probes)

    def draw(self, key: PRNGKeyArray | None, x: Point) -> Float[Array, "rank+probes size"]:
        """The vectors that find the range, and the signs."""
        return _signs(key, self.rank + self.probes, x)

    def __call__(
        self, products: Products, noise: Float[Array, "rank+probes size"]
    ) -> Float[Array, ""]:
        """The estimate."""
        finders, probes = noise[: self.rank], noise[self.rank :]
        basis, _ = jnp.linalg.qr(jax.lax.stop_gradient(products(finders)).T)
        rest = probes - probes @ basis @ basis.T
        return jnp.trace(products(basis.T) @ basis) + _quadratic(products, rest)


class LogDensity(NamedTuple):
    """What a solve backwards from a point finds."""

    value: Float[Array, ""]  # log p(x), in nats
    base_point: Point  # where the point comes from
    penalty: Float[Array, ""]  # of the regularizer, 0 without one
    solution: diffrax.Solution


class CNF(AbstractODE):
    """The law of x(1), where x' = vector_field(t, x, args) and x(0) ~ base; one example in, one out.
    See the module for the equations.

    It is trained by likelihood (`nde.losses.flow_likelihood`) or by `nde.losses.flow_matching`,
    which needs no solve. Called as a neural ODE, `cnf(ts, x)`, it gives the way of a point.

    Args:
        vector_field: `vector_field(t, x, args) -> dx`, arrays of shape (size,), t in [0, 1]:
            `nde.fields.MLPField(size, ..., time=True)`. With a context the law is conditional.
        base: `Normal(size)`, or any object with `sample(key)` and `log_prob(x)`.
        trace: `Exact()`, `Hutchinson(probes)` or `HutchPlusPlus(rank, probes)`.
        solver: How one step is taken, a `diffrax` solver.
        stepsize_controller: How long a step is, a `diffrax` step-size controller.
        adjoint: How gradients are taken.
        dt0: Length of the first step, positive in both directions of time; `None` lets the
            controller choose.
        max_steps: Largest number of attempted steps of one solve.

    Raises:
        ValueError: for numerics that can never work, a base or a field of another size, and, at a
            call, for a point that has not the size of the base.

    Example:
        >>> field = nde.fields.MLPField(2, width=64, depth=3, time=True, key=jax.random.key(0))
        >>> cnf = nde.CNF(field, nde.cnf.Normal(2))
        >>> x = cnf.sample(jax.random.key(1))                       # (2,)
        >>> log_probs = jax.vmap(cnf.log_prob)(xs)                  # (examples, 2) -> (examples,)
    """

    vector_field: Callable
    base: Any
    trace: AbstractTrace = eqx.field(default=Exact(), kw_only=True)

    def __check_init__(self):
        if isinstance(self.vector_field, Batched):
            raise ValueError(
                "`vector_field` is Batched: the trace of a field that mixes the examples of a batch is "
                "not the divergence of any of them. Give the field of one example, and jax.vmap the model."
            )
        if not isinstance(self.trace, AbstractTrace):
            raise ValueError(
                f"`trace` is {self.trace!r}; choose nde.cnf.Exact(), Hutchinson(probes=1) or "
                "HutchPlusPlus(rank=1, probes=1)."
            )
        if not (hasattr(self.base, "sample") and hasattr(self.base, "log_prob")):
            raise ValueError(
                f"`base` is {self.base!r}; it needs `sample(key)` and `log_prob(x)`, such as "
                "nde.cnf.Normal(size)."
            )
        shape = _shape_of(self.base)
        if len(shape) != 1:
            raise ValueError(f"`base` has samples of shape {shape}; a point is one array (size,).")
        if isinstance(self.trace, HutchPlusPlus) and self.trace.rank >= shape[0]:
            raise ValueError(
                f"`trace` has rank {self.trace.rank} in {shape[0]} dimensions, where the exact trace is "
                "cheaper; use trace=nde.cnf.Exact()."
            )

    def terms(self) -> diffrax.ODETerm:
        """x' = f(t, x, args)."""
        return diffrax.ODETerm(Rates(self.vector_field))

    def lift(self, t: Array, y0: Point, args: PyTree[Any]) -> Point:
        """The point, if it is one."""
        shape, needed = jnp.shape(y0), _shape_of(self.base)
        if shape != needed:
            raise ValueError(
                f"A point has shape {shape} but `base` has samples of shape {needed}: one example of the "
                "data. Use jax.vmap over a batch."
            )
        return y0

    def read(self, t: Array, y: Point, args: PyTree[Any]) -> Point:
        """The point."""
        return y

    def sample(self, key: PRNGKeyArray, args: PyTree[Any] = None) -> Point:
        """One draw of the law, shape (size,); `jax.vmap` over keys for more.

        Raises:
            ValueError: for a `key` that is none.
            nde.solvers.SolveError: if the solve fails, as `solve`.
        """
        check_key(key)
        z = self.base.sample(key)
        points: Any = self.solve(jnp.arange(2, dtype=z.dtype), z, args).ys
        return points[-1]

    def log_prob(
        self, x: Point, args: PyTree[Any] = None, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, ""]:
        """log p(x), in nats; with a random trace an estimate, whose mean it is.

        Args:
            x: A point, shape (size,).
            args: Passed to the vector field: the condition.
            key: Of the random vectors; not needed with `trace=Exact()`.

        Raises:
            ValueError: for a point of another size, or a missing `key`.
            nde.solvers.SolveError: if the solve fails, as `solve`.
        """
        return self.solve_back(x, args, key=key).value

    def solve_back(
        self,
        x: Point,
        args: PyTree[Any] = None,
        *,
        key: PRNGKeyArray | None = None,
        regularizer: Callable | None = None,
        throw: bool = True,
    ) -> LogDensity:
        """The solve of `log_prob`, with what else it finds.

        Args:
            x: A point, shape (size,).
            args: Passed to the vector field.
            key: Of the random vectors, and of the regularizer.
            regularizer: Of `nde.regularizers`, on this very solve, except `local`: `kinetic` (RNODE).
            throw: Whether a failed solve raises; if not, look at `.solution.result`.
        """
        trace_key, penalty_key = (None, None) if key is None else jax.random.split(key)
        x = self.lift(jnp.zeros(()), jnp.asarray(x), args)
        backwards = self
        if self.dt0 is not None:
            backwards = eqx.tree_at(lambda m: m.dt0, self, -self.dt0)
        density = _Density(backwards, self.trace.draw(trace_key, x))
        ts, penalty = jnp.arange(2, dtype=x.dtype)[::-1], jnp.zeros(())
        if regularizer is None:
            solution = density.solve(ts, x, args, throw=throw)
        else:
            solution, penalty = regularizer(density, ts, x, args, key=penalty_key)
        saved: Any = solution.ys
        points, gained = saved
        value = self.base.log_prob(points[-1]) + gained[-1]
        return LogDensity(value, points[-1], penalty, solution)


def straightness(
    cnf: CNF, keys: PRNGKeyArray, args: PyTree[Any] = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How far the ways of samples are from straight lines at constant speed.

        E (int |f|^2 dt - |x(1) - x(0)|^2) / E |x(1) - x(0)|^2

    0 where one Euler step is exact, as where `flow_matching` has learned an optimal coupling; the
    square of W2, the distance of base and law, is at most E |x(1) - x(0)|^2.

    Args:
        cnf: The flow.
        keys: Of the samples, shape (samples,).
        args: Passed to the vector field.

    Returns:
        The quotient, and the kinetic energy E int |f|^2 dt.
    """

    def of_one(key):
        z = cnf.base.sample(key)
        speed = _Speed(cnf.vector_field)
        saved: Any = cnf.solve(jnp.arange(2, dtype=z.dtype), z, args, integrand=speed).ys
        xs, energy = saved
        return energy[-1], jnp.sum((xs[-1] - xs[0]) ** 2)

    energy, squared = (jnp.mean(x) for x in jax.vmap(of_one)(keys))
    return (energy - squared) / squared, energy


def one_hot(labels: Int[Array, "*shape"], classes: int) -> Float[Array, "*shape classes"]:
    """Classes as conditions: 1 at the label, 0 elsewhere.

    Args:
        labels: From 0 to `classes` - 1.
        classes: How many there are: the context of the field.

    Raises:
        ValueError: for labels that are not integers, or out of range (under `jit` an error at run time).
    """
    check_count("classes", classes)
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise ValueError(f"`labels` has dtype {jnp.result_type(labels)}; labels are integers.")
    labels = jnp.asarray(labels)
    wrong = jnp.any((labels < 0) | (labels >= classes))
    told = (
        f"`labels` holds labels out of range; with {classes} classes they are 0 to {classes - 1}."
    )
    if is_traced(labels):
        labels = eqx.error_if(labels, wrong, told)
    elif wrong:
        found = f"They run from {jnp.min(labels)} to {jnp.max(labels)}."
        raise ValueError(f"{told} {found}")
    return jax.nn.one_hot(labels, classes)


class _Density(eqx.Module):
    """The flow as a model whose output is (point, divergence so far): what regularizers are given."""

    model: CNF
    noise: PyTree[Array]

    @property
    def vector_field(self):
        return self.model.vector_field

    @property
    def adjoint(self):
        return self.model.adjoint

    @property
    def dt0(self):
        return self.model.dt0

    def lift(self, t: Array, y0: PyTree[Array], args: PyTree[Any]):
        return self.model.lift(t, y0, args)

    def solve(
        self, ts, y0: PyTree[Array], args: PyTree[Any] = None, *, integrand=None, throw=True
    ) -> diffrax.Solution:
        """As `CNF.solve`; `.ys` is (points, divergences), or that and the integral."""
        both = _Divergence(self.model.vector_field, self.model.trace, self.noise, integrand)
        solution: Any = self.model.solve(ts, y0, args, integrand=both, throw=throw)
        points, (divergences, *penalty) = solution.ys
        ys = (points, divergences)
        return eqx.tree_at(lambda s: s.ys, solution, (ys, *penalty) if penalty else ys)


class _Divergence(eqx.Module):
    """div f along a solution, and another integrand beside it."""

    vector_field: Callable
    trace: AbstractTrace
    noise: PyTree[Array]
    other: Callable | None

    def __call__(self, t: Array, x: Point, args: PyTree[Any]) -> tuple[PyTree[Array], ...]:
        field = lambda x: Rates(self.vector_field)(t, x, args)
        product = lambda v: jax.jvp(field, (x,), (v,))[1]
        divergence = self.trace(jax.vmap(product), self.noise)
        # The loops of diffrax's own adjoints take no empty tuple.
        return (divergence,) if self.other is None else (divergence, self.other(t, x, args))


class _Speed(eqx.Module):
    vector_field: Callable

    def __call__(self, t: Array, x: Point, args: PyTree[Any]) -> Float[Array, ""]:
        return jnp.sum(self.vector_field(t, x, args) ** 2)


def _signs(key: Any, count: int, x: Point) -> Float[Array, "count size"]:
    check_key(key)
    return jax.random.rademacher(key, (count, x.size), x.dtype)


def _quadratic(products: Products, rows: Float[Array, "count size"]) -> Float[Array, ""]:
    """The mean of v^T J v over the rows v."""
    return jnp.sum(rows * products(rows)) / len(rows)


def _shape_of(base: Any) -> tuple[int, ...]:
    return eqx.filter_eval_shape(base.sample, jax.random.key(0)).shape
