r"""Likelihood of a fully observed diffusion, from its transitions; Ito.

    dX = f(t, X) dt + g(t, X) dW

One step of Euler-Maruyama makes the transition over h = t1 - t0 Gaussian,

    p(y1 | y0) ~ N(y1; y0 + f h, S h),      S = g g^T,     f and g at (t0, y0).

`euler_density` is its logarithm: exact for constant coefficients, else an error in the density of order h.
`bridge_density` halves that as often as wished: with `steps` steps of d = h / steps, unobserved states
x_1 .. x_(steps-1) are drawn from the modified diffusion bridge, which knows where it must end,

    q(x_(k+1) | x_k) = N(x_k + (y1 - x_k) / r, S d (r - 1) / r),       r = steps - k,

and the product of Euler densities along the path is averaged with importance weights,

    p(y1 | y0) ~ mean over draws of  prod_k p(x_(k+1) | x_k) / prod_(k < steps-1) q(x_(k+1) | x_k).

In code:    the shape of g says the noise: (channels,) or () is diagonal, (channels, noise) general.
Cost:       one evaluation of f and g per transition; or draws x steps of them.
Not for:    partly observed states, noisy observations, fewer noises than channels (no density), and
            transitions over which the process forgets where it was. A mean of weights is unbiased,
            its logarithm is too low by about half their relative variance / draws.
Reference:  A new approach to maximum likelihood estimation for stochastic differential equations based on
            discrete observations (1995); Numerical techniques for maximum likelihood estimation of
            continuous-time diffusion processes (2002); see also Bayesian inference for diffusion driven
            models: improved bridge constructs (2017) | arXiv:1509.09120
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from nde._inputs import check_callable
from nde._stochastic import AbstractSDE, in_ito_form
from nde.losses.samples import last_observed
from nde.losses.series import as_series
from nde.sde import HybridSDE
from nde.solvers.inputs import check_count


def euler_density(
    drift: Callable,
    diffusion: Callable,
    t0: Float[Array, ""],
    y0: Float[Array, " channels"],
    t1: Float[Array, ""],
    y1: Float[Array, " channels"],
    args: PyTree[Any] = None,
    *,
    key: PRNGKeyArray | None = None,
) -> Float[Array, ""]:
    """The logarithm of the density of one transition, by one step of Euler-Maruyama.

    Args:
        drift: `drift(t, y, args)`, shape (channels,), of the Ito equation.
        diffusion: `diffusion(t, y, args)`: shape (channels,) or () for a noise of each channel's own,
            (channels, noise) for noises that mix.
        t0: Time of the first state.
        y0: First state, shape (channels,).
        t1: Time of the second, later.
        y1: Second state.
        args: Passed to drift and diffusion.
        key: Not needed: nothing is drawn.

    Raises:
        ValueError: for a diffusion of another shape, or with fewer noises than channels.

    Reference:
        A new approach to maximum likelihood estimation for stochastic differential equations based on
        discrete observations (1995)
    """
    h = t1 - t0
    f, S = _coefficients(drift, diffusion, t0, y0, args)
    return _normal_log_density(y1 - y0 - f * h, S, h)


def bridge_density(
    drift: Callable,
    diffusion: Callable,
    t0: Float[Array, ""],
    y0: Float[Array, " channels"],
    t1: Float[Array, ""],
    y1: Float[Array, " channels"],
    args: PyTree[Any] = None,
    *,
    steps: int = 8,
    draws: int = 16,
    key: PRNGKeyArray,
) -> Float[Array, ""]:
    """The logarithm of the density of one transition, by simulation of what lies between.

    Args:
        drift, diffusion, t0, y0, t1, y1, args: As in `euler_density`.
        steps: Steps of Euler-Maruyama in the transition; 1 is `euler_density`.
        draws: Simulated paths. The logarithm of their mean is low by about their variance / (2 draws).
        key: Of the paths.

    Raises:
        ValueError: as `euler_density`.

    Reference:
        Numerical techniques for maximum likelihood estimation of continuous-time diffusion processes (2002)
    """
    check_count("steps", steps, ", such as 8")
    check_count("draws", draws, ", such as 16")
    d = (t1 - t0) / steps

    def advance(carry: Any, step: Any) -> tuple[Any, None]:
        x, weight = carry
        k, key = step
        t, rest = t0 + k * d, steps - k
        f, S = _coefficients(drift, diffusion, t, x, args)
        spread = d * (rest - 1) / rest
        z = jax.random.normal(key, x.shape, x.dtype)
        apart = _root(S, z) * jnp.sqrt(spread)
        new = x + (y1 - x) / rest + apart
        weight = weight + _normal_log_density(new - x - f * d, S, d)
        return (new, weight - _normal_log_density(apart, S, spread)), None

    def log_weight(key: PRNGKeyArray) -> Float[Array, ""]:
        numbers = jnp.arange(steps - 1).astype(y0.dtype)
        carry = (y0, jnp.zeros((), y0.dtype))
        if steps > 1:
            carry, _ = jax.lax.scan(advance, carry, (numbers, jax.random.split(key, steps - 1)))
        x, weight = carry
        return weight + euler_density(drift, diffusion, t1 - d, x, t1, y1, args)

    weights = jax.vmap(log_weight)(jax.random.split(key, draws))
    return jax.nn.logsumexp(weights) - math.log(draws)


def likelihood(
    model: Any,
    batch: Any,
    key: PRNGKeyArray,
    *,
    density: Callable = euler_density,
    args: PyTree[Any] = None,
) -> Float[Array, ""]:
    """The negative log-likelihood of an SDE whose state is observed, per observed transition.

    What to try first on a fully observed series. Give it to `nde.fit`, refined for data that are far apart:
    `functools.partial(losses.likelihood, density=losses.bridge_density)`.

    Args:
        model: An `nde.HybridSDE`, in either calculus; or another Ito SDE of the state that is observed:
            `model.drift(t, y, args)` and `model.diffusion(t, y, args)`, as of `euler_density`.
        batch: An `nde.train.Batch` whose data is `(ts, ys)`, shapes (examples, times) and (examples, times,
            channels), or `(ts, ys, mask)`, as of `trajectory` (nan is missing).
            A time counts where all channels do; a transition leads from one such time
            to the next.
        key: Of the density, if it draws.
        density: `density(drift, diffusion, t0, y0, t1, y1, args, key=key)`: `euler_density` or
            `bridge_density`, with its options bound by `functools.partial`.
        args: Passed to drift and diffusion.

    Raises:
        ValueError: for other data, a model without drift and diffusion, and as `euler_density`.
    """
    ts, ys, observed = as_series(batch.data, "likelihood")
    for name in ("drift", "diffusion"):
        check_callable(f"model.{name}", getattr(model, name, None), "(t, y, args)")
    if isinstance(model, AbstractSDE) and not isinstance(model, HybridSDE):
        raise ValueError(
            f"`model` is a {type(model).__name__}, whose state is hidden; the likelihood of transitions "
            "needs one whose state is observed: nde.HybridSDE, with networks as its parameters."
        )
    drift, diffusion = model.drift, model.diffusion
    if isinstance(model, HybridSDE):
        drift, diffusion = in_ito_form(model, drift, diffusion)
    seen = jnp.all(observed, axis=2)
    ys = jnp.where(seen[..., None], ys, 0.0)
    ts, ys = last_observed(ts, seen), last_observed(ys, seen)
    moved = (ts[:, 1:] > ts[:, :-1]) & batch.mask[:, None]
    t1 = jnp.where(moved, ts[:, 1:], ts[:, :-1] + 1.0)  # any step that has a density

    def one(t0: Array, y0: Array, t1: Array, y1: Array, key: PRNGKeyArray) -> Array:
        return density(drift, diffusion, t0, y0, t1, y1, args, key=key)

    keys = jax.random.split(key, moved.shape)
    logs = jax.vmap(jax.vmap(one))(ts[:, :-1], ys[:, :-1], t1, ys[:, 1:], keys)
    return -jnp.mean(jnp.where(moved, logs, 0.0), where=moved)


def _coefficients(
    drift: Callable, diffusion: Callable, t: Array, y: Array, args: PyTree[Any]
) -> tuple[Float[Array, " channels"], Array]:
    """The drift, and a root of S: the diagonal, or the lower Cholesky factor."""
    f, g = drift(t, y, args), jnp.asarray(diffusion(t, y, args), y.dtype)
    if jnp.shape(f) != y.shape:
        raise ValueError(
            f"`drift` returned shape {jnp.shape(f)} but the state has shape {y.shape}; return one rate "
            "per channel."
        )
    if g.shape in ((), y.shape):
        return f, jnp.broadcast_to(g, y.shape)
    if g.ndim != 2 or g.shape[0] != y.shape[0]:
        raise ValueError(
            f"`diffusion` returned shape {g.shape} but the state has shape {y.shape}; return (channels,) "
            "or () for a noise of each channel's own, (channels, noise) for noises that mix."
        )
    if g.shape[1] < g.shape[0]:
        raise ValueError(
            f"`diffusion` returned shape {g.shape}: fewer noises than channels leave the state on a "
            "surface, where it has no density. Use a score of paths: losses.path_score."
        )
    return f, jnp.linalg.cholesky(g @ g.T)


def _root(S: Array, z: Float[Array, " channels"]) -> Float[Array, " channels"]:
    return S * z if S.ndim == 1 else S @ z


def _normal_log_density(
    x: Float[Array, " channels"], root: Array, h: Float[Array, ""]
) -> Float[Array, ""]:
    """log N(x; 0, S h), from a root of S."""
    if root.ndim == 1:
        z, scale = x / root, jnp.abs(root)
    else:
        z = jax.scipy.linalg.solve_triangular(root, x, lower=True)
        scale = jnp.diagonal(root)
    return (
        -0.5 * jnp.sum(z**2) / h - jnp.sum(jnp.log(scale)) - 0.5 * x.size * jnp.log(2 * jnp.pi * h)
    )
