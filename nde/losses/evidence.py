"""The negative evidence lower bound of a latent model, simulated or matched, as a loss.

    loss = mean over series of  - log p(x | Z) + w (KL(q0 || p0) + KL of the paths),     w of the step

The paths of a latent ODE have no divergence of their own.

A weight that grows from zero lets the reconstruction start before the divergence pulls the posterior to
an untrained prior: `optax.linear_schedule(0.0, 1.0, 1000)`. In the end it must be 1.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from nde._inputs import check_callable
from nde.losses.metrics import solve_metrics
from nde.losses.series import as_series
from nde.solvers.inputs import check_count

Unit = Literal["series", "value"]


def evidence(
    model: Any,
    batch: Any,
    key: PRNGKeyArray,
    *,
    kl_weight: float | Callable = 1.0,
    samples: int = 1,
    per: Unit = "series",
    shown: Callable | None = None,
    low_variance: bool = False,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The negative ELBO of an `nde.LatentODE` or an `nde.LatentSDE`, by solves of the posterior.

    A series whose solve fails does not count; `nde.fit` stops when more than a tenth of them do.

    Args:
        model: An `nde.LatentODE` or `nde.LatentSDE`.
        batch: An `nde.train.Batch` whose data is `(ts, ys)`, shapes (examples, times) and (examples, times,
            channels), or `(ts, ys, mask)`, as of `trajectory` (nan is missing).
        key: Of the draws of the posterior; with `batch.keys` those are used.
        kl_weight: Of both divergences: a number, or a function of the step.
        samples: Draws of the posterior for each series, over which the likelihood is a mean.
        per: Whether the loss is a mean over the series, or over the observed values (nats per value: of
            one size whatever share of the series was observed).
        shown: `shown(ts)`, shape (times,), of Booleans: which rows the encoder is shown; all of them
            count for the likelihood. `lambda ts: ts <= 2.5` trains forecasts from there.
        low_variance: Whether to add the stochastic integral that makes the gradient of the path
            divergence less noisy, see `nde.LatentSDE.evidence`.

    Returns:
        The loss, and as metrics the parts of the bound in the same unit, and `failed`, `result`, `nfe`
        and `weight` as of `trajectory`.

    Raises:
        ValueError: for data or options that cannot be used.
    """
    check_count("samples", samples)
    if per not in get_args(Unit):
        raise ValueError(f'`per` is {per!r}; choose "series" or "value".')
    if shown is not None:
        check_callable("shown", shown, "(ts)")
    options = {"low_variance": True} if low_variance else {}

    def one(ts: Array, ys: Array, targets: Array, key: PRNGKeyArray) -> Any:
        bound = lambda key: model.evidence_and_solution(
            ts, ys, targets=targets, throw=False, key=key, **options
        )
        parts, solution = jax.vmap(bound)(jax.random.split(key, samples))
        parts = jax.tree.map(lambda x: jnp.mean(x, axis=0), parts)
        failed = solution.result != diffrax.RESULTS.successful
        first = lambda x: x[jnp.argmax(failed)]
        stats = jax.tree.map(jnp.sum, solution.stats)  # of all draws
        return parts, jax.tree.map(first, solution.result), stats

    ts, targets, observed = as_series(batch.data, "evidence")
    targets = jnp.where(observed, targets, jnp.nan)
    ys = targets if shown is None else jnp.where(jax.vmap(shown)(ts)[..., None], targets, jnp.nan)
    parts, results, stats = jax.vmap(one)(ts, ys, targets, batch.example_keys(key))
    failed = results != diffrax.RESULTS.successful
    sizes = jnp.ones(len(ts), ys.dtype)
    if per == "value":
        sizes = jnp.sum(observed, axis=(1, 2), dtype=ys.dtype)
    loss, metrics = _loss(parts, sizes, batch, batch.mask & ~failed, kl_weight)
    return loss, metrics | solve_metrics(results, stats, batch.mask)


def matched_evidence(
    model: Any,
    batch: Any,
    key: PRNGKeyArray,
    *,
    kl_weight: float | Callable = 1.0,
    samples: int = 1,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The negative ELBO of `nde.LatentSDE` with `PosteriorMarginals`, without simulation (SDE Matching).

    Args:
        model: An `nde.LatentSDE`.
        batch: As of `evidence`.
        key: Of the random times and states.
        kl_weight: Of both divergences: a number, or a function of the step.
        samples: Random times for the path divergence, one in each of so many equal parts.

    Returns:
        The loss, and as metrics the parts of the bound, means over the series.
    """

    def one(ts: Array, ys: Array, key: PRNGKeyArray) -> Any:
        return model.matched_evidence(ts, ys, samples=samples, key=key)

    ts, ys, observed = as_series(batch.data, "matched_evidence")
    parts = jax.vmap(one)(ts, jnp.where(observed, ys, jnp.nan), batch.example_keys(key))
    return _loss(parts, jnp.ones(len(ts), ys.dtype), batch, batch.mask, kl_weight)


def _loss(
    parts: Any,
    sizes: Float[Array, " examples"],
    batch: Any,
    counts: Bool[Array, " examples"],
    kl_weight: float | Callable,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The sum of what counts over the sum of its sizes."""
    weight = kl_weight(batch.step) if callable(kl_weight) else kl_weight
    dtype = parts.kl_path.dtype
    weight, sizes = jnp.asarray(weight, dtype), sizes.astype(dtype)  # schedules have their own
    total = lambda x: jnp.sum(jnp.where(counts, x, 0.0))
    mean = lambda x: total(x) / total(sizes)
    metrics = {field: mean(value) for field, value in parts._asdict().items()}
    return -mean(parts.elbo(weight)), metrics | {"weight": total(sizes)}
