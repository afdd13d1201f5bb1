r"""The latent ODE: a series as partial, noisy observations of one solution of a hidden equation.

    z(t0) ~ q0 = N(m, s_q^2),  (m, log s_q) = initial(c),  c = encoder(ts, ys) at the first time
    dz/dt = f(t, z)
    x_i ~ N(l(z(t_i)), s^2), channel by channel; what is NaN is missing

Trained by the evidence lower bound, where p0 is the law of z(t0) before a series is known,

    ELBO = E sum_i log p(x_i | z(t_i)) - KL(q0 || p0).

Whatever is uncertain about a series is in z(t0): from there on the solution is known at all times,
which makes forecasts of any length one solve, and bands of them many draws of z(t0).

Every series has times of its own. With `jax.vmap` each is solved over its own, and encoded in as many
steps as it has observations; on the union of the times of a batch it would be as many as all of them.

An observation std far below the residual at the start makes the divergence, and the bound, meaningless:
begin at a tenth of the spread of the data or more, and let the weight of the divergence grow.

In code:    f -> vector_field, p0 -> start, l -> decoder, s -> observation_std
Not for:    noise in the hidden state itself (`nde.LatentSDE`); one-step predictions (`nde.ODERNN`).
Reference:  Neural ordinary differential equations (2018) | arXiv:1806.07366
            Latent ODEs for irregularly-sampled time series (2019) | arXiv:1907.03907
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from nde._initial_value import checked
from nde._inputs import check_callable, check_key, check_times, check_vector_field
from nde._latent import (
    Evidence,
    Gaussian,
    GRUEncoder,
    Series,
    as_parameter,
    check_forwards,
    check_observation_std,
    check_series,
    encoded,
    gaussian_of,
    log_likelihood,
)
from nde._model import AbstractModel
from nde._solve import Rates, solve
from nde.solvers.inputs import is_traced

__all__ = ["Evidence", "GRUEncoder", "Gaussian", "LatentODE"]


class LatentODE(AbstractModel):
    """One series in, its evidence, its smooth path or its forecast out; `jax.vmap` is the batch. See the
    module for the equations.

    Args:
        encoder: `encoder(ts, ys) -> (times, context)`, of which the context of the first time is used:
            `GRUEncoder`, or `nde.odernn.Backwards`, an ODE-RNN.
        initial: `initial(context)`, shape (2 latent,): mean and log standard deviation of q0.
        vector_field: `vector_field(t, z, args) -> dz`, such as `nde.fields.MLPField`; `args` is None.
        decoder: `decoder(z) -> y`, shape (channels,), the mean of an observation.
        start: A `Gaussian`, p0, of `latent` entries.
        observation_std: Standard deviation of an observation, a number or shape (channels,), held
            fixed; or `nde.hybrid.Bounded` to learn it.
        solver: How one step is taken, a `diffrax` solver.
        stepsize_controller: How long a step is, a `diffrax` step-size controller.
        adjoint: How gradients are taken.
        dt0: First step, in the unit of the times; `None` lets the controller choose.
        max_steps: Largest number of attempted steps of one solve.

    Raises:
        ValueError: for parts or numerics that can never work, and, at a call, for a series that cannot be
            used, or that is missing everywhere.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 4)
        >>> model = nde.LatentODE(
        ...     nde.latent_ode.GRUEncoder(3, 32, 32, key=keys[0]),
        ...     eqx.nn.Linear(32, 8, key=keys[1]),
        ...     nde.fields.MLPField(4, 32, 2, key=keys[2]),
        ...     eqx.nn.Linear(4, 3, key=keys[3]),
        ...     nde.latent_ode.Gaussian(jnp.zeros(4), jnp.zeros(4)),
        ...     observation_std=0.1,
        ... )
        >>> evidence = model.evidence(ts, ys, key=key)              # (times,), (times, 3)
        >>> draw = lambda key: model.forecast(ts, ys, future, key=key)
        >>> draws = jax.vmap(draw)(jax.random.split(key, 100))      # (100, future times, 3)
        >>> low, high = jnp.quantile(draws, jnp.array([0.05, 0.95]), axis=0)
    """

    encoder: Callable
    initial: Callable
    vector_field: Callable
    decoder: Callable
    start: Gaussian
    observation_std: Any = eqx.field(kw_only=True, converter=as_parameter)

    def __check_init__(self):
        check_callable("encoder", self.encoder, "(ts, ys)")
        check_callable("initial", self.initial, "(context)")
        check_callable("vector_field", self.vector_field, "(t, z, args)")
        check_callable("decoder", self.decoder, "(z)")
        if not isinstance(self.start, Gaussian):
            raise ValueError(
                f"`start` is {self.start!r}; it is the law of the hidden state before a series is "
                "known: nde.latent_ode.Gaussian(mean, log_std)."
            )
        check_observation_std(self.observation_std)

    def evidence(
        self,
        ts: Float[Array, " times"],
        ys: Series,
        *,
        targets: Series | None = None,
        throw: bool = True,
        key: PRNGKeyArray,
    ) -> Evidence:
        """The parts of the ELBO of one series, with one draw of the posterior.

        Args:
            ts: Times, shape (times,), increasing; the last may repeat (padding).
            ys: Observations, shape (times, channels); NaN where there is none.
            targets: Observations whose likelihood counts; `None`: those that are encoded, `ys`. With
                NaN for the end of a series in `ys` alone, the model learns to forecast.
            throw: Whether a failed solve raises; if not, the likelihood is -inf there.
            key: Of q0.

        Raises:
            ValueError: for a series that cannot be used.
            nde.solvers.SolveError: with `throw`, if the solve fails.
        """
        return self.evidence_and_solution(ts, ys, targets=targets, throw=throw, key=key)[0]

    def evidence_and_solution(
        self,
        ts: Float[Array, " times"],
        ys: Series,
        *,
        targets: Series | None = None,
        throw: bool = True,
        key: PRNGKeyArray,
    ) -> tuple[Evidence, diffrax.Solution]:
        """The same, and the solve that it comes from."""
        posterior = self.posterior(ts, ys)
        solution: Any = self._solve(ts, posterior, throw, key)
        targets = ys if targets is None else targets
        likelihood = log_likelihood(
            self.decoder, solution.ys, targets, self.observation_std.value, solution.result
        )
        divergence = posterior.kl(self.start)
        return Evidence(likelihood, divergence, jnp.zeros_like(divergence)), solution

    def posterior(self, ts: Float[Array, " times"], ys: Series) -> Gaussian:
        """q0, the law of the hidden state at `ts[0]`, once a series is known."""
        check_times(ts)
        check_forwards(ts)
        check_series(ts, ys)
        _, contexts = encoded(self.encoder, ts, ys)
        posterior = gaussian_of("initial", self.initial(contexts[0]))
        if posterior.mean.shape != self.start.mean.shape:
            raise ValueError(
                f"`initial` gives a hidden state of {posterior.mean.shape} but `start` has "
                f"{self.start.mean.shape}; they are laws of one state."
            )
        return posterior

    def __call__(self, ts: Float[Array, " times"], ys: Series, *, key: PRNGKeyArray) -> Series:
        """The series as the posterior sees it: one decoded solution at `ts`, shape (times, channels)."""
        saved: Any = self.solve(ts, ys, key=key).ys
        return jax.vmap(self.decoder)(saved)

    def solve(
        self, ts: Float[Array, " times"], ys: Series, *, throw: bool = True, key: PRNGKeyArray
    ) -> diffrax.Solution:
        """The solve from one draw of the posterior, with its `.stats` and `.result`; `.ys` are the hidden
        states at `ts`. Arguments as for `evidence`."""
        return self._solve(ts, self.posterior(ts, ys), throw, key)

    def sample(self, ts: Float[Array, " times"], *, key: PRNGKeyArray) -> Series:
        """One decoded solution from p0 at `ts`, shape (times, channels), without the noise of
        observations."""
        saved: Any = self._solve(ts, self.start, True, key).ys
        return jax.vmap(self.decoder)(saved)

    def forecast(
        self,
        ts: Float[Array, " times"],
        ys: Series,
        future: Float[Array, " future"],
        *,
        key: PRNGKeyArray,
    ) -> Float[Array, "future channels"]:
        """One decoded solution at any times from `ts[0]` on, without the noise of observations.

        Args:
            ts: Times of the series, as for `evidence`.
            ys: Observations.
            future: Times, shape (future,), increasing, none before `ts[0]`: between observations, or
                after the last.
            key: Of q0.
        """
        check_times(future)
        if not is_traced(ts, future) and np.asarray(future)[0] < np.asarray(ts)[0]:
            raise ValueError(
                f"`future` begins at {future[0]}, before the series, at {ts[0]}, where the hidden "
                "state starts."
            )
        posterior = self.posterior(ts, ys)
        future = future.astype(posterior.mean.dtype)
        saved: Any = self._solve(
            jnp.concatenate([ts[:1].astype(future.dtype), future]), posterior, True, key
        ).ys
        return jax.vmap(self.decoder)(saved[1:])

    def _solve(self, ts: Array, law: Gaussian, throw: bool, key: PRNGKeyArray) -> diffrax.Solution:
        check_key(key)
        ts, z0 = checked(self, ts, law.draw(key))
        check_vector_field(self.vector_field, ts[0], z0, None)
        return solve(
            self,
            diffrax.ODETerm(Rates(self.vector_field)),
            z0,
            t0=ts[0],
            t1=ts[-1],
            saveat=diffrax.SubSaveAt(ts=ts),
            throw=throw,
        )
