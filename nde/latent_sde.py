r"""The latent SDE: a series as noisy, partial observations of a hidden stochastic equation.

    prior        dZ = h(t, Z) dt + g(t, Z) dW,        Z(t0) ~ p0
    posterior    dZ = f(t, Z, c) dt + g(t, Z) dW,     Z(t0) ~ q0(c)        the same g, Ito, diagonal
    observed     x_i ~ N(l(Z(t_i)), s^2), channel by channel; what is NaN is missing

with contexts c = (c_1, .., c_n) that an encoder makes of the series. Trained by the evidence lower bound

    ELBO = sum_i log p(x_i | Z(t_i)) - KL(q0 || p0) - E int |u|^2 / 2 dt,        u = (f - h) / g.

`evidence` simulates the posterior, and the last term rides along its solve. With `low_variance` the
estimate of it is  int |u|^2 / 2 dt + int u dW,  with the parameters of the second u held fixed: its
mean is the same, and where the posterior is right its gradient is no longer noise.

`matched_evidence` (SDE Matching) simulates nothing. The posterior is given by its marginals,
Z(t) = m(t, c) + s(t, c) eps, which the diffusion g shares with exactly one drift,

    f = m' + s' eps + g^2/2 (-eps / s) + 1/2 d(g^2)/dz,      eps = (z - m) / s

and the integral is T times its mean at random times.

The diffusion must stay away from zero, where u does not exist: `nde.fields.OwnNoise`.

In code:    h -> prior, f and q0 -> posterior, g -> diffusion, p0 -> start, l -> decoder,
            s -> observation_std
Not for:    a state that is observed in full: see the one-step likelihood of `nde.losses`.
Reference:  Scalable gradients for stochastic differential equations (2020) | arXiv:2001.01328
            Sticking the landing (2017) | arXiv:1703.09194
            SDE Matching (2025) | arXiv:2502.02472
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from nde._inputs import check_callable, check_key
from nde._latent import (
    Context,
    Evidence,
    Gaussian,
    GRUEncoder,
    Series,
    as_parameter,
    check_observation_std,
    check_series,
    encoded,
    gaussian_of,
    log_likelihood,
)
from nde._stochastic import (
    AbstractSDE,
    Calculus,
    Diffusion,
    Noise,
    calculus_of,
    check_times_of_noise,
    correction,
    solve_sde,
)
from nde.solvers.inputs import check_count, is_traced

__all__ = [
    "Evidence",
    "GRUEncoder",
    "Gaussian",
    "LatentSDE",
    "PosteriorDrift",
    "PosteriorMarginals",
]


class AbstractPosterior(eqx.Module):
    """Where the hidden state starts and how it drifts, once a series is known."""

    @abstractmethod
    def start(self, context: Context) -> Gaussian:
        """q0."""

    @abstractmethod
    def drift(
        self,
        t: Float[Array, ""],
        z: Float[Array, " latent"],
        context: Context,
        diffusion: Diffusion,
    ) -> Float[Array, " latent"]:
        """f(t, z, c)."""


class PosteriorDrift(AbstractPosterior):
    """A posterior whose drift is a network; simulated, for `LatentSDE.evidence`.

    Args:
        initial: `initial(context)`, shape (2 latent,): mean and log standard deviation of q0, from the
            context of the first time.
        field: `field(t, z, context) -> dz`, given the context of the next observation, such as
            `nde.fields.MLPField(latent, ..., context=..)`.
    """

    initial: Callable
    field: Callable

    def start(self, context: Context) -> Gaussian:
        """q0, from the context of the first time."""
        return gaussian_of("initial", self.initial(context[1][0]))

    def drift(self, t: Array, z: PyTree[Array], context: Any, diffusion):
        """f(t, z, c), c of the next observation."""
        del diffusion
        ts, contexts = context
        index = jnp.searchsorted(ts, t, side="right")
        return self.field(t, z, contexts[jnp.minimum(index, ts.shape[0] - 1)])


class PosteriorMarginals(AbstractPosterior):
    """A posterior whose marginals are a network, for `LatentSDE.matched_evidence`; it can be simulated
    too.

    Args:
        network: `network(t, context)`, shape (2 latent,): mean and log standard deviation at time t,
            smooth in both, such as `nde.fields.MLPField(context, .., out_size=2 * latent, time=True,
            final_activation=lambda x: x)`. It sees the mean of the contexts with weights that fall
            with the distance in time, softmax of -(sharpness (t - t_i))^2.
        sharpness: An array, trained: 1 / sharpness is about the time between observations.
    """

    network: Callable
    sharpness: Float[Array, ""] = eqx.field(
        converter=lambda x: jnp.asarray(x, jnp.result_type(x, float))
    )

    def start(self, context: Context) -> Gaussian:
        """q0, the marginal of the first time."""
        return self.at(context[0][0], context)

    def at(self, t: Float[Array, ""], context: Context) -> Gaussian:
        """The marginal at a time."""
        ts, contexts = context
        weights = jax.nn.softmax(-((self.sharpness.astype(ts.dtype) * (ts - t)) ** 2))
        return gaussian_of("network", self.network(t, weights @ contexts))

    def drift(self, t: Array, z: PyTree[Array], context: Any, diffusion):
        """The one drift that gives the marginals this diffusion."""
        at = lambda t: self.at(t, context)
        marginal, change = jax.jvp(at, (t,), (jnp.ones_like(t),))
        eps = (z - marginal.mean) * jnp.exp(-marginal.log_std)
        velocity = change.mean + (z - marginal.mean) * change.log_std  # s' eps = s eps (log s)'
        g = diffusion.field(t, z, None)
        score = -eps * jnp.exp(-marginal.log_std)
        return velocity + g**2 / 2 * score + 2 * correction(diffusion, t, z, None)


class LatentSDE(AbstractSDE):
    """One series in, its evidence, its smoothed path or its forecast out; `jax.vmap` is the batch. See
    the module for the equations.

    Args:
        encoder: `encoder(ts, ys) -> (times, context)`, such as `GRUEncoder`.
        posterior: A `PosteriorDrift`, or `PosteriorMarginals`.
        prior: `prior(t, z, args) -> dz`, such as `nde.fields.MLPField`; `args` is None.
        diffusion: `diffusion(t, z, args)`, shape (latent,), positive and bounded below, such as
            `nde.fields.OwnNoise`.
        decoder: `decoder(z) -> y`, shape (channels,), the mean of an observation.
        start: A `Gaussian`, p0, of `latent` entries.
        observation_std: Standard deviation of an observation, a number or shape (channels,), held
            fixed; or `nde.hybrid.Bounded` to learn it.
        steps_per_interval: Steps of equal length from each time to the next.
        solver: How one step is taken, a `diffrax` solver that knows noise.
        adjoint: How gradients are taken.
        stepsize_controller: How long adaptive steps are, for `steps_per_interval=None`.
        dt0: First adaptive step.
        max_steps: Largest number of attempted adaptive steps of one solve.

    Raises:
        ValueError: for parts or numerics that can never work, a diffusion that is zero, and, at a
            call, for a series that cannot be used, or that is missing everywhere.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 6)
        >>> model = nde.LatentSDE(
        ...     nde.latent_sde.GRUEncoder(3, 64, 32, key=keys[0]),
        ...     nde.latent_sde.PosteriorDrift(
        ...         eqx.nn.Linear(32, 8, key=keys[1]),
        ...         nde.fields.MLPField(4, 64, 1, context=32, time=True, key=keys[2]),
        ...     ),
        ...     nde.fields.MLPField(4, 64, 1, key=keys[3]),
        ...     nde.fields.OwnNoise(4, 16, least=0.05, most=1.0, key=keys[4]),
        ...     eqx.nn.Linear(4, 3, key=keys[5]),
        ...     nde.latent_sde.Gaussian(jnp.zeros(4), jnp.zeros(4)),
        ...     observation_std=0.1,
        ... )
        >>> evidence = model.evidence(ts, ys, key=key)              # (times,), (times, 3)
        >>> forecast = model.forecast(ts, ys, future, key=key)      # (future times, 3)
    """

    encoder: Callable
    posterior: AbstractPosterior
    prior: Callable
    diffusion: Callable
    decoder: Callable
    start: Gaussian
    observation_std: Any = eqx.field(kw_only=True, converter=as_parameter)
    solver: diffrax.AbstractSolver = eqx.field(default=diffrax.Euler(), kw_only=True)

    def __check_init__(self):
        check_callable("encoder", self.encoder, "(ts, ys)")
        check_callable("prior", self.prior, "(t, z, args)")
        check_callable("diffusion", self.diffusion, "(t, z, args)")
        check_callable("decoder", self.decoder, "(z)")
        for name, kind in (("posterior", AbstractPosterior), ("start", Gaussian)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}; make it of nde.latent_sde: "
                    "PosteriorDrift(...) or PosteriorMarginals(...), and Gaussian(mean, log_std)."
                )
        check_observation_std(self.observation_std)
        if not is_traced((self.start, self.diffusion)):
            g = self.diffusion(jnp.zeros((), self.start.mean.dtype), self.start.mean, None)
            if not is_traced(g) and np.any(np.asarray(g) == 0):
                raise ValueError(
                    f"`diffusion` is {g} at the mean of `start`; where it is zero the divergence "
                    "of prior and posterior is infinite. Bound it below: "
                    "nde.fields.OwnNoise(latent, width, least=0.05, most=1.0, key=key)."
                )

    @property
    def noise_type(self) -> Noise:
        return "diagonal"

    @property
    def calculus(self) -> Calculus:
        return "ito"

    def evidence(
        self,
        ts: Float[Array, " times"],
        ys: Series,
        *,
        targets: Series | None = None,
        low_variance: bool = False,
        throw: bool = True,
        key: PRNGKeyArray,
    ) -> Evidence:
        """The parts of the ELBO of one series, with one simulated path of the posterior.

        Args:
            ts: Times, shape (times,), increasing, at least two; the last may repeat (padding).
            ys: Observations, shape (times, channels); NaN where there is none.
            targets: Observations whose likelihood counts; `None`: those that are encoded, `ys`.
            low_variance: Whether to add the stochastic integral of the module, for a gradient with
                less noise. It needs an Ito solver.
            throw: Whether a failed solve raises; if not, the evidence is -inf or NaN there.
            key: Of q0 and of the noise.

        Raises:
            ValueError: for a series that cannot be used, or `low_variance` with another solver.
        """
        options = {"targets": targets, "low_variance": low_variance, "throw": throw}
        return self.evidence_and_solution(ts, ys, **options, key=key)[0]

    def evidence_and_solution(
        self,
        ts: Float[Array, " times"],
        ys: Series,
        *,
        targets: Series | None = None,
        low_variance: bool = False,
        throw: bool = True,
        key: PRNGKeyArray,
    ) -> tuple[Evidence, diffrax.Solution]:
        """The same, and the solve that it comes from."""
        context = self._context(ts, ys)
        solution = self._solve(context, low_variance, throw, key)
        saved: Any = solution.ys
        zs, integral = saved
        kl_start = self.posterior.start(context).kl(self.start)
        likelihood = self._log_likelihood(zs, ys if targets is None else targets, solution.result)
        return Evidence(likelihood, kl_start, integral[-1]), solution

    def matched_evidence(
        self, ts: Float[Array, " times"], ys: Series, *, samples: int = 1, key: PRNGKeyArray
    ) -> Evidence:
        """The parts of the ELBO of one series, without simulation: of a `PosteriorMarginals`.

        Args:
            ts: Times, shape (times,), increasing, at least two; the last may repeat (padding).
            ys: Observations, shape (times, channels); NaN where there is none.
            samples: Random times, one in each of so many equal parts, for the integral.
            key: Of the times and of the states.

        Raises:
            ValueError: for a series that cannot be used, or another posterior.
        """
        posterior = self.posterior
        if not isinstance(posterior, PosteriorMarginals):
            raise ValueError(
                f"`posterior` is a {type(posterior).__name__}; without simulation its marginals must be "
                "known: nde.latent_sde.PosteriorMarginals(network, sharpness)."
            )
        check_count("samples", samples)
        context = self._context(ts, ys)
        key_observed, key_time, key_state = jax.random.split(key, 3)
        keys = jax.random.split(key_observed, ts.shape[0])
        zs = jax.vmap(lambda t, key: posterior.at(t, context).draw(key))(context[0], keys)
        horizon = context[0][-1] - context[0][0]
        parts = jnp.arange(samples, dtype=horizon.dtype)
        share = (parts + jax.random.uniform(key_time, (samples,), horizon.dtype)) / samples

        def rate(share, key):
            t = context[0][0] + share * horizon
            z = posterior.at(t, context).draw(key)
            return self._rate(t, z, context)

        rates = jax.vmap(rate)(share, jax.random.split(key_state, samples))
        kl_start = posterior.start(context).kl(self.start)
        return Evidence(self._log_likelihood(zs, ys), kl_start, horizon * jnp.mean(rates))

    def __call__(self, ts: Float[Array, " times"], ys: Series, *, key: PRNGKeyArray) -> Series:
        """The series as the posterior sees it: one decoded path at `ts`, shape (times, channels)."""
        saved: Any = self.solve(ts, ys, key=key).ys
        return jax.vmap(self.decoder)(saved[0])

    def solve(
        self, ts: Float[Array, " times"], ys: Series, *, throw: bool = True, key: PRNGKeyArray
    ) -> diffrax.Solution:
        """The solve of the posterior with its `.stats` and `.result`; `.ys` are the hidden states at `ts`,
        and the path divergence up to there. Arguments as for `evidence`."""
        return self._solve(self._context(ts, ys), False, throw, key)

    def sample(self, ts: Float[Array, " times"], *, key: PRNGKeyArray) -> Series:
        """One decoded path of the prior at `ts`, shape (times, channels), without the noise of
        observations."""
        check_key(key)
        key_start, key_path = jax.random.split(key)
        return jax.vmap(self.decoder)(self._prior_path(ts, self.start.draw(key_start), key_path))

    def forecast(
        self,
        ts: Float[Array, " times"],
        ys: Series,
        future: Float[Array, " future"],
        *,
        key: PRNGKeyArray,
    ) -> Float[Array, "future channels"]:
        """One decoded path at times after the series, without the noise of observations: the posterior
        up to the last time, and the prior from there.

        Args:
            ts: Times of the series, as for `evidence`.
            ys: Observations.
            future: Times, shape (future,), increasing, all after `ts[-1]`.
            key: Of q0 and of the noise.
        """
        check_key(key)
        key_past, key_future = jax.random.split(key)
        saved: Any = self.solve(ts, ys, key=key_past).ys
        zs, _ = saved
        ts = jnp.concatenate([ts[-1:], future])
        return jax.vmap(self.decoder)(self._prior_path(ts, zs[-1], key_future)[1:])

    def _prior_path(self, ts, z0, key) -> Float[Array, "times latent"]:
        solution = solve_sde(self, self.prior, self.diffusion, ts, z0, None, key=key, throw=True)
        return solution.ys  # pyright: ignore[reportReturnType]

    def _solve(
        self, context: Context, low_variance: bool, throw: bool, key: PRNGKeyArray
    ) -> diffrax.Solution:
        """The posterior at the times of the series, and what its path divergence is up to there."""
        check_key(key)
        key_start, key_path = jax.random.split(key)
        noise = None
        if low_variance:
            if calculus_of(self.solver) != "ito":
                raise ValueError(
                    "`low_variance` adds an Ito integral, but the `solver`, "
                    f"{type(self.solver).__name__}, is for Stratonovich ones. Use diffrax.Euler() or "
                    "nde.solvers.SOSRI()."
                )
            noise = _Held(self)
        return solve_sde(
            self,
            self._posterior_drift,
            self.diffusion,
            context[0],
            self.posterior.start(context).draw(key_start),
            context,
            key=key_path,
            integrand=self._rate,
            noise=noise,
            throw=throw,
        )

    def _posterior_drift(self, t, z, context):
        return self.posterior.drift(t, z, context, Diffusion(self.diffusion, "diagonal"))

    def _steering(self, t, z, context):
        """u = (f - h) / g."""
        apart = self._posterior_drift(t, z, context) - self.prior(t, z, None)
        return apart / self.diffusion(t, z, None)

    def _rate(self, t, z, context):
        return jnp.sum(self._steering(t, z, context) ** 2) / 2

    def _log_likelihood(self, zs, ys, result=diffrax.RESULTS.successful) -> Float[Array, ""]:
        return log_likelihood(self.decoder, zs, ys, self.observation_std.value, result)

    def _context(self, ts, ys) -> Context:
        check_times_of_noise(ts, self.dt0)
        check_series(ts, ys)
        return encoded(self.encoder, ts, ys)


class _Held(eqx.Module):
    """u of a model whose parameters, and contexts, are held fixed: it depends on the state alone."""

    model: LatentSDE

    def __init__(self, model: LatentSDE):
        params, rest = eqx.partition(model, eqx.is_inexact_array)
        self.model = eqx.combine(jax.lax.stop_gradient(params), rest)

    def __call__(self, t: Array, z: Array, context: Context) -> Array:
        return self.model._steering(t, z, jax.lax.stop_gradient(context))
