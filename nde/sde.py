r"""Stochastic differential equations: a neural generator, and equations that are known.

    dX = mu(t, X, args) dt + sigma(t, X, args) dW

The generator makes a series from noise alone,

    V ~ N(0, I),    X(ts[0]) = zeta(V),    Y(t) = l(X(t)),

and is trained by a score of its samples: `nde.losses` compares laws, or a critic does (`nde.gan`).
The hybrid model has the user's own mu and sigma, known equations with unknown numbers, or a network
anywhere in them, and starts from a state that is given.

Which loss: not a squared error between paths. It is least where the noise is zero.

Steps are part of the model: few of them train a model of that many steps. See by twice as many whether
it still does the same.

In code:    mu, sigma -> drift, diffusion    zeta -> initial, l -> readout
Not for:    one noisy series and its hidden state: `nde.LatentSDE`.
Reference:  Neural SDEs as infinite-dimensional GANs (2021) | arXiv:2102.03657
            Efficient and accurate gradients for neural SDEs (2021) | arXiv:2105.13493
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from nde._inputs import check_callable, check_key
from nde._parameters import check_made, floating_leaves, physical
from nde._stochastic import AbstractSDE, Calculus, Noise, State, solve_sde
from nde.solvers.inputs import check_count

__all__ = ["HybridSDE", "NeuralSDE"]


class NeuralSDE(AbstractSDE):
    """A generator of paths: noise in, one path out; `jax.vmap` over keys is a sample.

    Args:
        initial: `initial(v) -> x`, from `initial_noise` standard normals, shape (initial_noise,), to
            the hidden state, shape (hidden,). Make its weights large enough that the paths start
            as spread as the data.
        drift: `drift(t, x, args) -> dx`, such as `nde.fields.MLPField`. Bounded, or the state may
            escape.
        diffusion: `diffusion(t, x, args)`, of the shape that `noise_type` says, such as
            `nde.fields.MatrixField`, whose `channels` are then those of the noise.
        readout: `readout(x) -> y`, of any shape.
        initial_noise: Number of normals that the first state is made of.
        noise_type: How the diffusion acts on the noise. `"diagonal"`: it has the shape of the state,
            and a noise for every entry. `"scalar"`: it has the shape of the state, and one noise for
            all. `"general"`: it has one more axis, of the channels of the noise. `"additive"`: it does
            not depend on the state, and is shaped as `"diagonal"` or `"general"`.
        calculus: `"ito"` or `"stratonovich"`, in which the equation is written. It is changed to that
            of the solver.
        steps_per_interval: Steps of equal length from each time of `ts` to the next; `None` leaves
            them to `stepsize_controller`, which must be adaptive.
        solver: How one step is taken, a `diffrax` solver that knows noise. With
            `nde.solvers.ReversibleHeun()` and `adjoint=nde.solvers.ReversibleAdjoint()` the memory of
            a gradient does not grow with the steps.
        stepsize_controller: How long an adaptive step is, a `diffrax` step-size controller.
        adjoint: How gradients are taken.
        dt0: First adaptive step, in the unit of `ts`; `None` lets the controller choose.
        max_steps: Largest number of attempted adaptive steps of one solve.

    Raises:
        ValueError: for parts or numerics that can never work, and, at a call, for `ts` or a `key`
            that cannot be used, or a diffusion that does not fit its `noise_type`.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 4)
        >>> model = nde.NeuralSDE(
        ...     eqx.nn.MLP(5, 16, 16, 1, key=keys[0]),
        ...     nde.fields.MLPField(16, 16, 1, time=True, key=keys[1]),
        ...     nde.fields.MatrixField(16, 3, 16, 1, time=True, key=keys[2]),
        ...     eqx.nn.Linear(16, 1, key=keys[3]),
        ...     initial_noise=5,
        ... )
        >>> y = model(ts, key=key)                                        # (times, 1)
        >>> ys = jax.vmap(lambda key: model(ts, key=key))(keys)           # (paths, times, 1)
    """

    initial: Callable
    drift: Callable
    diffusion: Callable
    readout: Callable = lambda x: x
    initial_noise: int = eqx.field(kw_only=True, static=True)
    noise_type: Noise = eqx.field(default="general", kw_only=True, static=True)
    calculus: Calculus = eqx.field(default="stratonovich", kw_only=True, static=True)

    def __check_init__(self):
        check_callable("initial", self.initial, "(v)")
        check_callable("drift", self.drift, "(t, x, args)")
        check_callable("diffusion", self.diffusion, "(t, x, args)")
        check_callable("readout", self.readout, "(x)")
        check_count("initial_noise", self.initial_noise)

    def __call__(
        self, ts: Float[Array, " times"], args: PyTree[Any] = None, *, key: PRNGKeyArray
    ) -> PyTree[Float[Array, "times ..."]]:
        """One path at `ts`, shape (times, channels)."""
        return jax.vmap(self.readout)(self.solve(ts, args, key=key).ys)

    def solve(
        self,
        ts: Float[Array, " times"],
        args: PyTree[Any] = None,
        *,
        integrand: Callable | None = None,
        throw: bool = True,
        key: PRNGKeyArray,
    ) -> diffrax.Solution:
        """The same solve with its `.stats` and `.result`; `.ys` are the hidden states.

        Args:
            ts: Times, shape (times,), increasing, at least two; the last may repeat (padding).
            args: A condition, passed to drift and diffusion.
            integrand: `integrand(t, x, args)`, arrays of any shape. `.ys` is then a pair, of the hidden
                states and of its integral from `ts[0]`.
            throw: Whether a failed solve raises. If not, look at `.result`: `.ys` is inf where it
                was not reached.
            key: Of the first state and of the noise. The same key gives the same path.

        Raises:
            ValueError: if `ts`, `key` or what the parts return cannot be used.
            nde.solvers.SolveError: with `throw`, if the solve fails; inside `jax.jit` and other
                transformations a RuntimeError.
        """
        check_key(key)
        key_start, key_path = jax.random.split(key)
        dtype = getattr(ts, "dtype", None)
        floating = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
        v = jax.random.normal(key_start, (self.initial_noise,), dtype if floating else float)
        x0 = _initial_state(self.initial, v)
        return solve_sde(
            self,
            self.drift,
            self.diffusion,
            ts,
            x0,
            args,
            key=key_path,
            integrand=integrand,
            throw=throw,
        )


class HybridSDE(AbstractSDE):
    """Known stochastic equations, with unknown numbers and networks: one state in, one path out;
    `jax.vmap` over keys (and states) is a sample.

    Args:
        known_drift: `known_drift(t, y, p, args) -> dy`, shaped like the state, with `p` the parameters
            in physical units.
        known_diffusion: `known_diffusion(t, y, p, args)`, of the shape that `noise_type` says.
        parameters: PyTree of what is unknown: numbers or arrays, `nde.hybrid.Positive`, `Bounded`,
            `Frozen`, and networks, such as `nde.fields.MLPField`, which the two functions call where they
            please: `p["speed"] * (p["net"](t, y) - y)`.
        noise_type: How the diffusion acts on the noise. `"diagonal"`: it has the shape of the state,
            and a noise for every entry. `"scalar"`: it has the shape of the state, and one noise for
            all. `"general"`: it has one more axis, of the channels of the noise. `"additive"`: it does
            not depend on the state, and is shaped as `"diagonal"` or `"general"`.
        calculus: `"ito"` or `"stratonovich"`, in which the equations are written: to be said, because
            the same drift and diffusion mean two different laws. It is changed to that of the
            solver.
        steps_per_interval: Steps of equal length from each time of `ts` to the next; `None` leaves
            them to `stepsize_controller`, which must be adaptive.
        solver: How one step is taken, a `diffrax` solver that knows noise.
        stepsize_controller: How long an adaptive step is, a `diffrax` step-size controller.
        adjoint: How gradients are taken.
        dt0: First adaptive step, in the unit of `ts`; `None` lets the controller choose.
        max_steps: Largest number of attempted adaptive steps of one solve.

    Raises:
        ValueError: for parts or numerics that can never work, and, at a call, for input that cannot
            be solved.

    Example:
        >>> model = nde.HybridSDE(
        ...     lambda t, y, p, args: p["speed"] * (p["mean"] - y),
        ...     lambda t, y, p, args: p["noise"] * jnp.sqrt(jnp.maximum(y, 0)),
        ...     {"speed": nde.hybrid.Positive(1.0), "mean": 0.5, "noise": nde.hybrid.Positive(0.2)},
        ...     calculus="ito",
        ...     solver=diffrax.Euler(),
        ... )
        >>> y = model(ts, jnp.array([0.3]), key=key)                       # (times, 1)
    """

    known_drift: Callable
    known_diffusion: Callable
    parameters: PyTree[Any] = eqx.field(default=None, converter=floating_leaves)
    noise_type: Noise = eqx.field(default="diagonal", kw_only=True, static=True)
    calculus: Calculus = eqx.field(kw_only=True, static=True)

    def __check_init__(self):
        check_callable("known_drift", self.known_drift, "(t, y, p, args)")
        check_callable("known_diffusion", self.known_diffusion, "(t, y, p, args)")
        check_made(self.parameters)

    def drift(self, t: Float[Array, ""], y: State, args: PyTree[Any]) -> State:
        """The drift at time `t` and state `y`, shaped like `y`, in the `calculus` of the model."""
        return self.known_drift(t, y, self.physical_parameters(), args)

    def diffusion(self, t: Float[Array, ""], y: State, args: PyTree[Any]) -> Array:
        """The diffusion at time `t` and state `y`, of the shape that `noise_type` says."""
        return self.known_diffusion(t, y, self.physical_parameters(), args)

    def physical_parameters(self) -> PyTree[Any]:
        """The parameters by name, in physical units and the shapes they were made with."""
        return physical(self.parameters)

    def __call__(
        self, ts: Float[Array, " times"], y0: State, args: PyTree[Any] = None, *, key: PRNGKeyArray
    ) -> Float[Array, "times *state"]:
        """One path at `ts` from `y0` at `ts[0]`, shape (times, ...)."""
        return self.solve(ts, y0, args, key=key).ys  # pyright: ignore[reportReturnType]

    def solve(
        self,
        ts: Float[Array, " times"],
        y0: State,
        args: PyTree[Any] = None,
        *,
        integrand: Callable | None = None,
        throw: bool = True,
        key: PRNGKeyArray,
    ) -> diffrax.Solution:
        """The same solve with its `.stats` and `.result`.

        Args:
            ts: Times, shape (times,), increasing, at least two; the last may repeat (padding).
            y0: State at `ts[0]`, one array of any shape.
            args: Passed to drift and diffusion: a measured input, a condition.
            integrand: `integrand(t, y, args)`, arrays of any shape: an energy, a cost. `.ys` is then a
                pair, of the states and of its integral from `ts[0]`.
            throw: Whether a failed solve raises. If not, look at `.result`: `.ys` is inf where it
                was not reached.
            key: Of the noise. The same key gives the same path.

        Raises:
            ValueError: if `ts`, `y0`, `key` or what the fields return cannot be used.
            nde.solvers.SolveError: with `throw`, if the solve fails; inside `jax.jit` and other
                transformations a RuntimeError.
        """
        return solve_sde(
            self,
            self.drift,
            self.diffusion,
            ts,
            y0,
            args,
            key=key,
            integrand=integrand,
            throw=throw,
        )


def _initial_state(initial: Callable, v: Float[Array, " initial_noise"]) -> State:
    """initial(v), or what is wrong with it."""
    try:
        x0 = initial(v)
    except (TypeError, IndexError) as error:
        raise ValueError(
            f"`initial` cannot be applied to noise of shape {v.shape}, of which `initial_noise` is the "
            f"size: {str(error).splitlines()[0]}"
        ) from error
    if jnp.ndim(x0) != 1:
        raise ValueError(f"`initial` returned shape {jnp.shape(x0)}; a hidden state is (hidden,).")
    return x0
