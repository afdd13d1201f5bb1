r"""Mixed effects: subjects that vary around shared values, and how much.

    u_i = u + spread eta_i,  eta_i ~ N(0, 1),        y_ij ~ errors of size s

Given spread and s, the most probable u and eta are a least-squares problem,

    minimize  sum_ij r_ij^2 / s^2 + sum_i |eta_i|^2,

and with C = (J^T J)^-1 the covariance of all of them at its solution, the spread and s that make the
data most probable (EM, with the posterior taken as normal there) are

    spread^2  <-  spread^2 mean_i (eta_i^2 + var eta_i)
    s^2       <-  s^2 (sum_ij r_ij^2 / s^2 + p - sum_i var eta_i) / n.

The two alternate until they agree. The variances in the sums are what a fit of every subject alone, and
the standard deviation of the results, leaves out. The shared values are averaged over as well, so the
spread is that of restricted maximum likelihood, slightly above that of maximum likelihood.

In code:    u -> center, eta -> offsets, s -> std
Not for:    few data per subject with strongly nonlinear models, where the posterior is not normal.
Reference:  Nonlinear mixed effects models for repeated measures data (Lindstrom and Bates, 1990) |
            doi:10.2307/2532087
"""

import warnings
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nde._parameters import Frozen, RandomEffect, number_of_subjects, random_effects
from nde.inference import Estimate, least_squares, measured_residuals
from nde.measured import Experiments, Gaussian, LogNormal, Measured
from nde.solvers.inputs import check_count


def mixed_effects(
    model: Measured,
    data: Experiments,
    *,
    rounds: int = 100,
    rtol: float = 1e-2,
    **options: Any,
) -> Estimate:
    """Fits a population: shared values, the effect of every subject, their spread, and the errors.

    Args:
        model: An `nde.Measured` with `nde.hybrid.RandomEffect` parameters, whose spreads are where to
            start from; so is the `std` of `Gaussian` and `LogNormal` errors.
        data: `nde.measured.experiments`, with the subject of each.
        rounds: Largest number of rounds of the two.
        rtol: A round that changes no spread and no std by more than this share is the last one. A spread
            below a hundredth is taken for zero: it does not count.
        options: Of `nde.least_squares`.

    Returns:
        The `nde.inference.Estimate`: `found.model` has the estimated spreads and errors,
        `found.of(lambda m: ...)` the standard errors of anything.

    Raises:
        ValueError: for a model without random effects, a subject without data, and data of a subject that
            the model has not.

    Warns:
        UserWarning: if the rounds end before the two agree.
    """
    check_count("rounds", rounds)
    _check_subjects(model, data)
    found, change = None, np.inf
    for _ in range(rounds):
        found = least_squares(model, data, measured_residuals, noise=1.0, **options)
        model, change = _updated(found, data)
        if change < rtol:
            break
    else:
        warnings.warn(
            f"Spread and errors still change by {change:.1%} after {rounds} rounds; raise `rounds`.",
            stacklevel=2,
        )
    assert found is not None  # there is a round
    return eqx.tree_at(lambda e: e.model, found, model)


def _updated(found: Estimate, data: Experiments) -> tuple[Measured, float]:
    """The model with new spreads and errors, and the largest relative change."""
    model = found.model
    effects = random_effects(model)
    variances = random_effects(found.at(jnp.diagonal(found.covariance)))
    changes = []

    def spread(effect: RandomEffect, variance: RandomEffect) -> Array:
        squares = effect.offsets**2 + variance.offsets
        ratio = jnp.mean(squares, axis=0 if effect.spread.value.ndim else None)
        if bool(jnp.any(effect.spread.value > 1e-2)):
            changes.append(np.max(np.abs(np.sqrt(ratio) - 1)))
        return effect.spread.value * jnp.sqrt(ratio)

    spreads = [spread(*pair) for pair in zip(effects, variances, strict=True)]
    model = eqx.tree_at(lambda m: [e.spread.constant for e in random_effects(m)], model, spreads)
    if isinstance(model.errors, Gaussian | LogNormal):
        observed = ~jnp.isnan(data.ys)
        left = measured_residuals(found.model, data)[0]
        eta = sum(jnp.sum(v.offsets) for v in variances)
        ratio = (jnp.sum(left**2) + found.theta.size - eta) / jnp.sum(observed, dtype=left.dtype)
        changes.append(abs(np.sqrt(ratio) - 1))
        std = Frozen(model.errors.std.value * jnp.sqrt(ratio))
        model = eqx.tree_at(lambda m: m.errors.std, model, std)
    return model, float(max(changes, default=0.0))


def _check_subjects(model: Measured, data: Experiments) -> None:
    if not random_effects(model):
        raise ValueError(
            "`model` has no nde.hybrid.RandomEffect; without one, use nde.least_squares with "
            "nde.inference.measured_residuals."
        )
    count = number_of_subjects(model)
    seen = set(np.asarray(data.subject).tolist())
    missing = sorted(set(range(count or 0)) - seen)
    if missing:
        raise ValueError(
            f"`data` has nothing of the subjects {missing} of {count}; leave them out."
        )
    if max(seen) >= (count or 0):
        raise ValueError(
            f"`data` has a subject {max(seen)} but the model is of {count}; numbers are from 0."
        )
