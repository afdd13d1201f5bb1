"""# Missing terms of predator and prey: how often are they found?

    x' = 1.3 x - 0.9 x y,      y' = 0.8 x y - 1.8 y

Known are the growth of the prey and the death of the predators, not the products. A network takes their
place; 31 noisy observations train it; regression on it proposes sums of one and two terms, and the
trajectory chooses. One lucky run shows little, so all seeds are trained side by side, as one stacked
model, and the result is a rate: the share of seeds with exactly the term x y in each equation. Network
and formulas are fitted by Levenberg-Marquardt through the solve Y, the network with a prior,

    min |(Y - y) / sigma|^2 + |w|^2,      n log |Y - y|^2 + k log n + 2 log(supports of k terms),

and the formula of k terms is chosen by the extended BIC, which asks more of a term that was picked from
many: 62 numbers do not support what a plain criterion adds.

*Gotcha: first the field on smoothed slopes (collocation), then the trajectory. The second alone starts
far away, the first alone ends at the bias of the smoother.*

Reference: Universal Differential Equations for Scientific Machine Learning (2020) | arXiv:2001.04385
"""

import itertools
import math

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix

import nde
from nde.train import Batch

jax.config.update("jax_enable_x64", True)

NAMES = ("x", "y")
TERMS = ("1.0", *nde.symbolic.polynomials(NAMES, 3))
LIBRARY = nde.symbolic.Field.parse(TERMS, NAMES)  # all terms, as one field
PAIRS = itertools.combinations_with_replacement(range(len(TERMS)), 2)
SUPPORTS = np.array([np.isin(range(len(TERMS)), pair) for pair in PAIRS])
NOISE = (0.001, 0.01, 0.025)
Y0 = jnp.array([0.44249296, 4.6280594])
TS = jnp.linspace(0.0, 3.0, 31)
STEPS = {"stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.1}  # errors near 1e-5


def known(t, y, p):
    return jnp.stack([1.3 * y[0], -1.8 * y[1]])


def hybrid(field):
    return nde.HybridODE(known, field, None, adjoint=diffrax.ForwardMode(), **STEPS)


def formula(constants):
    return hybrid(lambda t, y, args: constants @ LIBRARY(t, y, args))


def measurements(seeds, seed):
    """Shape (noises times seeds, times, 2); errors in shares of the mean of each channel."""
    field = nde.symbolic.Field.parse(["-0.9 * x * y", "0.8 * x * y"], NAMES)
    exact = diffrax.PIDController(rtol=1e-9, atol=1e-9)
    ys = np.asarray(nde.HybridODE(known, field, None, stepsize_controller=exact)(TS, Y0))
    draws = np.random.default_rng(seed).normal(size=(len(NOISE), seeds, *ys.shape))
    noise = np.reshape(NOISE, (-1, 1, 1, 1)) * ys.mean(axis=0) * draws
    return jnp.asarray((ys + noise).reshape(-1, *ys.shape))


def by_slopes(models, batch, key):
    points = eqx.filter_vmap(lambda m, data: nde.losses.collocation(m, Batch(data), key))
    return jnp.mean(points(models, batch.data)), {}


def misfits(model, y0, ys, scale):
    misfit = (model.solve(TS, y0, throw=False).ys - ys) / scale
    return jnp.where(jnp.isfinite(misfit), misfit, 1e3)  # a failed solve is far away


def least_squares(residuals, start, steps):
    solver, forward = optimistix.LevenbergMarquardt(rtol=1e-6, atol=1e-6), {"jac": "fwd"}
    return optimistix.least_squares(
        residuals, solver, start, options=forward, max_steps=steps, throw=False
    ).value


def train(ys, steps, key):
    """Models and initial states of all seeds, stacked."""
    smooth = [nde.symbolic.slopes(TS, y, window=9, degree=4) for y in ys]
    states, rates = (jnp.asarray(np.stack(part)) for part in zip(*smooth, strict=True))
    network = lambda key: nde.fields.MLPField(2, 6, 2, scale=3.0, last_layer_scale=0.1, key=key)
    models, _ = nde.fit(
        eqx.filter_jit(eqx.filter_vmap(lambda key: hybrid(network(key))))(
            jax.random.split(key, len(ys))
        ),
        by_slopes,
        (jnp.tile(TS, (len(ys), 1)), states, rates),
        optim=optax.adam(optax.cosine_decay_schedule(2e-2, 40 * steps)),
        steps=40 * steps,
        progress=False,
        key=key,
    )

    @eqx.filter_jit
    @eqx.filter_vmap
    def through_solve(model, y0, states, ys):
        sigma = jnp.sqrt(jnp.mean((states - ys) ** 2, axis=0) / 0.58)  # the smoother takes 42 %
        weights, rest = eqx.partition(model, eqx.is_inexact_array)
        residuals = lambda x, _: (misfits(eqx.combine(x[0], rest), x[1], ys, sigma), x[0])
        weights, y0 = least_squares(residuals, (weights, y0), steps)
        return eqx.combine(weights, rest), y0

    return through_solve(models, states[:, 0], states, ys)


def proposals(terms, values, keep=4):
    """Constants of the sums of one term and of two that are closest to the network."""
    fits = np.stack([np.linalg.lstsq(terms * s, values, rcond=None)[0] for s in SUPPORTS])
    order = np.argsort(np.sum((fits @ terms.T - values) ** 2, axis=1))
    sizes = np.sum(SUPPORTS[order], axis=1)
    best = np.concatenate([order[sizes == size][:keep] for size in (1, 2)])
    return fits[best] * SUPPORTS[best]


@eqx.filter_jit
@eqx.filter_vmap
def along(model, y0):
    """The terms, and what the network has learned, on a dense trajectory."""
    states = model(jnp.linspace(0.0, 3.0, 121), y0)
    both = lambda y: (LIBRARY(0.0, y, None), model.network(0.0, y))
    return jax.vmap(both)(states)


def score(start, y0, ys, steps):
    """The extended BIC of a formula, and its constants, fitted through the solve."""
    is_in, scale = start != 0, jnp.std(ys, axis=0)
    residuals = lambda x, _: misfits(formula(x[0] * is_in), x[1], ys, scale)
    constants, y0 = least_squares(residuals, (start, y0), steps)
    size = jnp.sum(is_in, axis=1)
    supports = jnp.array([1.0, *(math.comb(len(TERMS), k) for k in (1, 2))])[size]
    rss = jnp.sum(residuals((constants, y0), None) ** 2)
    price = jnp.sum(size * jnp.log(ys.size) + 2 * jnp.log(supports))
    return ys.size * jnp.log(rss) + price, constants * is_in


def formulas(models, y0s, ys, steps):
    """Of every seed the chosen constants of all terms in both equations; shape (seeds, 2, terms)."""
    starts = []
    for terms, values in zip(*map(np.asarray, along(models, y0s)), strict=True):
        pair = (proposals(terms, column) for column in values.T)
        starts.append(list(itertools.product(*pair)))
    each = jax.vmap(lambda start, y0, ys: score(start, y0, ys, steps), (0, None, None))
    scores, constants = jax.jit(jax.vmap(each))(jnp.asarray(np.array(starts)), y0s, ys)
    return np.asarray(constants)[np.arange(len(ys)), np.argmin(scores, axis=1)]


def picture(rates, products):
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.bar(list(rates), list(rates.values()), color="#4477AA")
    left.set(xlabel="noise", ylabel="share of seeds with exactly x y", ylim=(0, 1))
    for noise, values in products.items():
        right.plot(*values.T, "o", label=f"noise {noise}", alpha=0.7)
    right.plot(-0.9, 0.8, "k+", ms=14, label="truth")
    right.set(xlabel="coefficient of x y for the prey", ylabel="for the predators")
    right.legend(frameon=False)
    nde.plot.save(fig, "universal_lotka_volterra.png")


def main(steps: int = 30, plot: bool = True, *, seeds: int = 20, seed: int = 0) -> dict:
    """The share of seeds with exactly the missing terms, by noise."""
    ys = measurements(seeds, seed)
    found = formulas(*train(ys, steps, jax.random.key(seed)), ys, steps // 2 + 1)
    found = dict(zip(map("{:.1%}".format, NOISE), np.split(found, len(NOISE)), strict=True))
    product = np.array(TERMS) == "x * y"
    right = {noise: np.all((c != 0) == product, axis=(1, 2)) for noise, c in found.items()}
    rates = {noise: float(np.mean(is_right)) for noise, is_right in right.items()}
    for noise, rate in rates.items():
        error = math.sqrt(rate * (1 - rate) / seeds)
        print(f"noise {noise}: x y alone in {rate:.0%} +- {error:.0%} of {seeds} seeds")
    if plot:
        picture(rates, {noise: c[right[noise]][..., product][..., 0] for noise, c in found.items()})
    if steps >= 30:  # fewer are a trial of the program
        assert rates["0.1%"] >= 0.75 and rates["1.0%"] >= 0.58 and rates["2.5%"] >= 0.29
    return rates


# *What to take away*: what a method finds in one run, it may not find in the next: report the rate.

if __name__ == "__main__":
    main()
