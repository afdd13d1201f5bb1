r"""What the latent models share: normal laws, the parts of the bound, encoders, observations.

    observed    x_i ~ N(l(z(t_i)), s^2), channel by channel; what is NaN is missing
    context     c_i = encoder(ts, ys)_i, of every time of a series

`log_likelihood` and the encoders replace what is missing before any arithmetic: 0 * nan is nan.

In code:    l -> decoder, s -> observation_std
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, PRNGKeyArray

from nde._inputs import check_key
from nde._parameters import AbstractParameter, Frozen
from nde.solvers.inputs import check_count, is_traced

Series = Float[Array, "times channels"]
Context = tuple[Float[Array, " times"], Float[Array, "times context"]]


class Evidence(NamedTuple):
    """The parts of the evidence lower bound of one series, in nats.

    Attributes:
        log_likelihood: Sum over what was observed.
        kl_start: KL(q0 || p0).
        kl_path: Estimate of that of the paths from there on.
    """

    log_likelihood: Float[Array, ""]
    kl_start: Float[Array, ""]
    kl_path: Float[Array, ""]

    def elbo(self, kl_weight: Any = 1.0) -> Float[Array, ""]:
        """The bound, with both divergences times `kl_weight`."""
        return self.log_likelihood - kl_weight * (self.kl_start + self.kl_path)


class Gaussian(eqx.Module):
    """Independent normals.

    Args:
        mean: Shape (size,).
        log_std: Logarithms of the standard deviations, shape (size,).
    """

    mean: Float[Array, " size"]
    log_std: Float[Array, " size"]

    def draw(self, key: PRNGKeyArray) -> Float[Array, " size"]:
        """One sample."""
        return self.at(jax.random.normal(key, self.mean.shape, self.mean.dtype))

    def at(self, eps: Float[Array, " size"]) -> Float[Array, " size"]:
        """mean + std eps."""
        return self.mean + jnp.exp(self.log_std) * eps

    def kl(self, other: "Gaussian") -> Float[Array, ""]:
        """KL(self || other)."""
        apart = (self.mean - other.mean) * jnp.exp(-other.log_std)
        log_ratio = self.log_std - other.log_std
        return jnp.sum((apart**2 + jnp.exp(2 * log_ratio) - 1) / 2 - log_ratio)


class GRUEncoder(eqx.Module):
    """A context for every time of a series, by a gated recurrent unit that runs backwards.

    The context of a time knows the observations from there on; with `both_ways` all of them. A step is
    told what was observed (zero elsewhere), where, the time since the step before and since the start, so
    that a drift that sees the time knows how far the next observation is; where nothing was observed
    there is no step, and times after the last observation are not seen.

    Args:
        channels: Of the series.
        hidden: Size of the unit's state.
        context: Size of a context.
        both_ways: Whether a second unit runs forwards.
        time_scale: What a time gap is divided by: the length of the series, so that networks see
            numbers of order one, and the equation keeps its own time.
        key: Of the initial weights.
    """

    backwards: eqx.nn.GRUCell
    forwards: eqx.nn.GRUCell | None
    output: eqx.nn.Linear
    time_scale: float = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        hidden: int,
        context: int,
        *,
        both_ways: bool = False,
        time_scale: float = 1.0,
        key: PRNGKeyArray,
    ):
        check_key(key)
        for name, count in (("channels", channels), ("hidden", hidden), ("context", context)):
            check_count(name, count)
        if not time_scale > 0:
            raise ValueError(f"`time_scale` is {time_scale}; it is a length of time, positive.")
        keys = jax.random.split(key, 3)
        self.backwards = eqx.nn.GRUCell(2 * channels + 2, hidden, key=keys[0])
        self.forwards = eqx.nn.GRUCell(2 * channels + 2, hidden, key=keys[1]) if both_ways else None
        self.output = eqx.nn.Linear(hidden * (1 + both_ways), context, key=keys[2])
        self.time_scale = time_scale

    def __call__(self, ts: Float[Array, " times"], ys: Series) -> Float[Array, "times context"]:
        """The contexts of a series, NaN where it is missing."""
        states = self._run(self.backwards, ts, ys, reverse=True)
        if self.forwards is not None:
            before = self._run(self.forwards, ts, ys, reverse=False)
            states = jnp.concatenate([states, before], axis=1)
        return jax.vmap(self.output)(states)

    def _run(self, cell: eqx.nn.GRUCell, ts: Array, ys: Series, reverse: bool) -> Array:
        def step(carry: Any, row: Any):
            state, last, began = carry
            t, y, seen = row
            gap = jnp.where(began, jnp.abs(t - last), 0)[None] / self.time_scale
            since = jnp.abs(t - ts[0])[None] / self.time_scale
            inputs = jnp.concatenate([y, seen.astype(y.dtype), gap, since])
            here = jnp.any(seen)
            state = jnp.where(here, cell(inputs, state), state)
            return (state, jnp.where(here, t, last), began | here), state

        seen = ~jnp.isnan(ys)
        rows = (ts, jnp.where(seen, ys, 0), seen)
        start = (jnp.zeros(cell.hidden_size, ys.dtype), ts[0], jnp.zeros((), bool))
        return jax.lax.scan(step, start, rows, reverse=reverse)[1]


def encoded(encoder: Callable, ts: Float[Array, " times"], ys: Series) -> Context:
    """The times, in one precision with the observations, and a context of each."""
    dtype = jnp.promote_types(ts.dtype, ys.dtype)
    ts = ts.astype(dtype)
    contexts = encoder(ts, ys.astype(dtype))
    if jnp.ndim(contexts) != 2 or contexts.shape[0] != ts.shape[0]:
        raise ValueError(
            f"`encoder` returned shape {jnp.shape(contexts)} for {ts.shape[0]} times; return a "
            "context for each, shape (times, context)."
        )
    return ts, contexts


def as_parameter(std: ArrayLike | AbstractParameter) -> AbstractParameter:
    """A standard deviation as a parameter: a number is held fixed."""
    return std if isinstance(std, AbstractParameter) else Frozen(std)


def check_observation_std(parameter: AbstractParameter) -> None:
    """It is positive."""
    std = parameter.value
    if not is_traced(std) and not np.all(np.asarray(std) > 0):
        raise ValueError(f"`observation_std` is {std}; it must be positive.")


def log_likelihood(
    decoder: Callable,
    zs: Float[Array, "times latent"],
    ys: Series,
    std: Float[Array, "..."],
    result: diffrax.RESULTS,
) -> Float[Array, ""]:
    """sum_i log p(x_i | z_i) over what was observed; -inf, without a gradient, after a failed solve."""
    reached = diffrax.is_okay(result)
    means = jax.vmap(decoder)(jnp.where(reached, zs, 0))
    if means.shape != ys.shape:
        raise ValueError(
            f"`decoder` gives {means.shape[1:]} at a time but `ys` has {ys.shape[1:]}; return the "
            "mean of one observation, shape (channels,)."
        )
    std = jnp.broadcast_to(std.astype(means.dtype), means.shape[1:])
    seen: Bool[Array, "times channels"] = ~jnp.isnan(ys)
    z = (means - jnp.where(seen, ys.astype(means.dtype), 0)) / std[None]
    log_density = -(z**2) / 2 - jnp.log(std)[None] - 0.5 * np.log(2 * np.pi)
    return jnp.where(reached, jnp.sum(jnp.where(seen, log_density, 0)), -jnp.inf)


def gaussian_of(name: str, both: Float[Array, " 2*latent"]) -> Gaussian:
    """Mean and log standard deviation, one after the other, as a law."""
    if both.ndim != 1 or both.shape[0] % 2:
        raise ValueError(
            f"`{name}` returned shape {both.shape}; return mean and log standard deviation of the "
            "hidden state, shape (2 latent,)."
        )
    mean, log_std = jnp.split(both, 2)
    return Gaussian(mean, log_std)


def check_series(ts: Float[Array, " times"], ys: Series) -> None:
    """`ys` has a row for every time, and something was observed."""
    check_values(ts, ys)
    if not is_traced(ys) and np.isnan(np.asarray(ys)).all():
        raise ValueError("`ys` is missing (NaN) everywhere; a series has at least one observation.")


def check_values(ts: Float[Array, " times"], ys: Series) -> None:
    """`ys` has a row for every time."""
    if not eqx.is_array(ys) or ys.ndim != 2 or ys.shape[0] != ts.shape[0]:
        shape = getattr(ys, "shape", type(ys).__name__)
        raise ValueError(
            f"`ys` has shape {shape} and `ts` {ts.shape}; one call takes one series, shape (times, "
            "channels), NaN where something is missing. Use jax.vmap over the batch."
        )
    if not jnp.issubdtype(ys.dtype, jnp.floating):
        raise ValueError(f"`ys` has dtype {ys.dtype}; observations are floating: ys.astype(float).")


def check_forwards(ts: Float[Array, " times"]) -> None:
    """Series run forwards: a model of them starts at the first time."""
    if not is_traced(ts) and np.asarray(ts)[-1] < np.asarray(ts)[0]:
        raise ValueError(
            f"`ts` decreases from {ts[0]} to {ts[-1]}; a series runs forwards: ts[::-1], ys[::-1]."
        )
