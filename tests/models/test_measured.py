"""`Measured` models: errors against SciPy, doses and jumps on split intervals, subjects, populations."""

import dataclasses

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from messages import mentions
from scipy.integrate import solve_ivp

import nde
from nde.hybrid import Bounded, Frozen, PerSubject, Positive, RandomEffect, of_subject
from nde.measured import Gaussian, LogNormal, NegativeBinomial, Poisson, by_subject, experiments
from nde.train import Batch

KEY = jax.random.key(0)
TIGHT = {"stepsize_controller": diffrax.PIDController(rtol=1e-10, atol=1e-12)}
LAWS = [
    (Gaussian(0.3), lambda y, m: scipy.stats.norm.logpdf(y, m, 0.3)),
    (LogNormal(0.3), lambda y, m: scipy.stats.lognorm.logpdf(y, 0.3, scale=m)),
    (Poisson(), scipy.stats.poisson.logpmf),
    (NegativeBinomial(4.0), lambda y, m: scipy.stats.nbinom.logpmf(y, 4.0, 4.0 / (4.0 + m))),
]


@pytest.mark.parametrize("errors, log_density", LAWS, ids=lambda x: type(x).__name__)
def test_laws_of_errors_are_those_of_scipy(errors, log_density):
    """The density, and the residual: its square is the deviance, also next to and at the mean."""
    y = np.array([1.0, 2.0, 7.0, 7.0, 300.0] + ([0.0] if errors.whole else []))
    mean = np.array([1.0, 2.01, 3.0, 7.1, 250.0] + ([2.0] if errors.whole else []))
    found = errors.log_density(jnp.asarray(y), jnp.asarray(mean))
    np.testing.assert_allclose(found, log_density(y, mean), rtol=1e-10)
    residual = np.asarray(errors.residual(jnp.asarray(y), jnp.asarray(mean)))
    deviance = 2 * (log_density(y, y) - log_density(y, mean))
    np.testing.assert_allclose(residual**2, deviance, rtol=1e-8, atol=1e-11)
    assert np.all(np.sign(residual) == np.sign(mean - y))
    slope = jax.vmap(jax.grad(errors.residual, argnums=1))(jnp.asarray(y), jnp.asarray(mean))
    assert np.all(np.isfinite(slope)) and np.all(slope > 0)


def test_samples_have_the_mean_and_the_variance_of_their_law():
    mean = jnp.full(20_000, 5.0)
    for errors, variance in [(Poisson(), 5.0), (NegativeBinomial(4.0), 5 + 25 / 4)]:
        draws = errors.sample(mean, KEY)
        assert abs(draws.mean() - 5) < 4 * np.sqrt(variance / 2e4)
        assert abs(draws.var() / variance - 1) < 0.06


def driven(known, network, t, y, p, path):
    return known(t, y, p) + path.evaluate(t)


def test_doses_and_inputs_that_jump_are_met_exactly():
    """Two compartments, doses into the first, a switched input: SciPy, from jump to jump."""

    def kinetics(t, y, p):
        return jnp.stack([-p["a"] * y[0], p["a"] * y[0] - p["e"] * y[1] ** 2])

    knots = np.array([0.0, 0.7, 1.9, 4.0])
    heights = [np.array([[0.0, 1.0], [0.5, 0.0], [0.0, 2.0], [0, 0]]) * c for c in (1.0, 2.0)]
    doses = [(np.array([0.0, 1.3]), np.array([[1.0, 0.0], [2.0, 0.5]])), ([2.5], [[3.0, 0.0]])]
    series = [
        (np.array([0.0, 0.5, 1.3, 1.9, 3.1]), np.zeros((5, 2))),
        ([1.0, 4.0], np.zeros((2, 2))),
    ]
    data = experiments(
        series,
        t0=0.0,
        args=[nde.paths.held(knots, h) for h in heights],
        doses=doses,
        jumps=[knots, knots],
    )
    p = {"a": 1.1, "e": 0.4}
    model = nde.Measured(nde.HybridODE(kinetics, None, p, combine=driven, **TIGHT), jnp.ones(2))
    found = jax.jit(jax.vmap(model))(data)
    for i, (ts, _) in enumerate(series):
        times, amounts = (np.asarray(x) for x in doses[i])
        y, t, expected = np.ones(2), 0.0, {}
        for stop in sorted({*knots, *times, *ts}):
            if stop > t:
                level = heights[i][np.searchsorted(knots, (t + stop) / 2) - 1]
                rate = lambda t, y, u=level: np.asarray(kinetics(t, y, p)) + u
                y = solve_ivp(rate, (t, stop), y, rtol=1e-11, atol=1e-12).y[:, -1]
            expected[stop], t = y, stop  # what is observed at a dose is the state before it
            y = y + amounts[times == stop].sum(axis=0)
        np.testing.assert_allclose(found[i, : len(ts)], [expected[t] for t in ts], atol=1e-8)


def decay(t, y, p):
    return -p["k"] * y


def population(subjects=3, **options):
    parameters = {"k": RandomEffect(Positive(0.8), 0.3, subjects)}
    ode = nde.HybridODE(decay, None, parameters, **options)
    return nde.Measured(
        ode, PerSubject(jnp.arange(1.0, subjects + 1)[:, None]), None, Gaussian(0.1)
    )


SERIES = [([0.5, 1.0], [0.4, 0.3]), ([0.5, 1.0, 2.0], [1.2, np.nan, 0.5]), ([1.5], [1.1])]


def with_offsets(model, offsets):
    where = lambda m: m.ode.parameters["k"].offsets
    return eqx.tree_at(where, model, jnp.asarray(offsets))


def test_subjects_have_parameters_of_their_own():
    """The likelihood of all is that of each alone, with the law of the effects; gaps do not count."""
    offsets = np.array([0.5, -1.0, 2.0])
    model = with_offsets(population(**TIGHT), offsets)
    data = experiments(SERIES, t0=0.0, subject=[0, 1, 2])
    ks = 0.8 * np.exp(0.3 * offsets)
    np.testing.assert_allclose(model.ode.physical_parameters()["k"], ks, rtol=1e-12)
    assert isinstance(of_subject(model, 1).ode.parameters["k"], Positive)
    value, metrics = nde.losses.negative_log_likelihood(model, Batch(data), KEY)
    total, count = -np.sum(offsets**2) / 2, 0
    for i, (ts, ys) in enumerate(SERIES):
        mean = (i + 1) * np.exp(-ks[i] * np.array(ts))
        total += np.nansum(scipy.stats.norm.logpdf(ys, mean, 0.1))
        count += np.sum(np.isfinite(ys))
    assert float(metrics["weight"]) == count == 5
    np.testing.assert_allclose(value, -total / count, rtol=1e-8)
    swapped = experiments(SERIES[::-1], t0=0.0, subject=[2, 1, 0])
    np.testing.assert_allclose(
        nde.losses.negative_log_likelihood(model, Batch(swapped), KEY)[0], value, rtol=1e-12
    )
    grads = eqx.filter_grad(lambda m: nde.losses.negative_log_likelihood(m, Batch(data), KEY)[0])(
        model
    )
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    assert np.all(grads.start.parameter != 0)


def test_a_start_is_known_free_or_a_function_and_what_is_held_stays():
    """From one fit: the free start and the rate move, what is `Frozen` is bit-equal, bounds hold."""
    data = experiments([(np.arange(1, 5) / 2, 3 * np.exp(-0.5 * np.arange(1, 5)))], t0=0.0)

    def fitted(start, parameters):
        model = nde.Measured(nde.HybridODE(decay, None, parameters), start, None, Gaussian(0.1))
        return nde.fit(
            model,
            nde.losses.negative_log_likelihood,
            data,
            optim=optax.adam(optax.cosine_decay_schedule(0.1, 300)),
            steps=300,
            progress=False,
            key=KEY,
        )[0]

    model = fitted(jnp.ones(1), {"k": Bounded(0.5, 0.1, 1.5), "b": Frozen(1 / 3)})
    np.testing.assert_allclose(model.start, 3.0, atol=0.1)
    assert abs(model.ode.parameters["k"].value - 1) < 0.05
    assert float(model.ode.parameters["b"].constant) == 1 / 3
    start = lambda p, x: p["y0"][None]
    model = fitted(start, {"k": Frozen(1.0), "y0": Positive(1.0)})
    np.testing.assert_allclose(model.initial_state(None), 3.0, atol=2e-2)


def test_counts_of_an_epidemic_are_fitted_by_their_deviance():
    """Least squares of the residuals is the maximum of the Poisson likelihood: a scan over the rate."""
    ts = np.arange(1.0, 9.0)
    counts = np.random.default_rng(0).poisson(20 * np.exp(-0.3 * ts)).astype(float)
    data = experiments([(ts, counts)], t0=0.0)
    ode = nde.HybridODE(decay, None, {"k": Positive(0.5)}, **TIGHT)
    model = nde.Measured(ode, Frozen(jnp.array([20.0])), None, Poisson())
    found = nde.least_squares(model, data, nde.inference.measured_residuals, noise=1.0)
    rates = np.linspace(0.2, 0.4, 20001)
    logs = scipy.stats.poisson.logpmf(counts, 20 * np.exp(-rates[:, None] * ts)).sum(axis=1)
    value, error = found.of(lambda m: m.ode.physical_parameters()["k"])
    assert abs(value - rates[logs.argmax()]) < 2e-5
    information = np.sum(20 * np.exp(-value * ts) * ts**2)  # of Fisher
    np.testing.assert_allclose(error, 1 / np.sqrt(information), rtol=0.25)


def test_a_population_has_the_variances_of_an_analysis_of_variance():
    """Constant states: restricted maximum likelihood is closed form for a balanced one-way layout."""
    rng, subjects, times = np.random.default_rng(1), 6, 5
    ys = 2.0 + 0.8 * rng.normal(size=(subjects, 1)) + 0.3 * rng.normal(size=(subjects, times))
    data = experiments([(np.arange(times) * 1.0, y) for y in ys])
    constant = nde.HybridODE(lambda t, y, p: 0.0 * y, None, {"u": RandomEffect(1.0, 0.5, subjects)})
    model = nde.Measured(constant, lambda p, x: p["u"][None], None, Gaussian(1.0))
    found = nde.mixed_effects(model, data, rtol=1e-4)
    within = np.sum((ys - ys.mean(axis=1, keepdims=True)) ** 2) / (subjects * (times - 1))
    between = times * np.var(ys.mean(axis=1), ddof=1)
    spread = found.model.ode.parameters["u"].spread.value
    np.testing.assert_allclose(spread, np.sqrt((between - within) / times), rtol=1e-3)
    np.testing.assert_allclose(found.model.errors.std.value, np.sqrt(within), rtol=1e-3)
    center, error = found.of(lambda m: m.ode.parameters["u"].center)
    np.testing.assert_allclose(center, ys.mean(), rtol=1e-6)
    np.testing.assert_allclose(error, np.sqrt(between / ys.size), rtol=1e-2)


def test_a_table_becomes_series():
    table = {"who": ["b", "a", "b"], "t": [2.0, 0.5, 1.0], "y": [1.0, 2.0, 3.0]}
    series, names = by_subject(table, "who", "t", ["y"])
    assert names == ["b", "a"]
    np.testing.assert_array_equal(series[0][0], [1.0, 2.0])
    np.testing.assert_array_equal(series[0][1], [[3.0], [1.0]])


@pytest.mark.parametrize("coordinates", ["Shares", "Logarithms"])
def test_states_stay_positive_and_shares_keep_their_total(coordinates):
    """A network that would carry states below zero, at a loose tolerance."""
    drain = lambda t, y, args: jnp.array([-1.0, 0.5, -0.5])
    ode = nde.HybridODE(
        lambda t, y, p: jnp.stack([-y[0] * y[1], y[0] * y[1] - y[1], y[1]]),
        drain,
        None,
        coordinates=getattr(nde.hybrid, coordinates)(),
        combine=lambda known, network, t, y, p, args: known(t, y, p) + y * network(t, y, args),
    )
    ys = ode(jnp.linspace(0.0, 5.0, 11), jnp.array([0.9, 0.05, 0.05]))
    assert np.all(ys > 0)
    if coordinates == "Shares":
        np.testing.assert_allclose(ys.sum(axis=1), 1.0, atol=1e-12)
    closed = dataclasses.replace(ode, network=lambda t, y, args: 0.0 * y, **TIGHT)
    plain = dataclasses.replace(closed, coordinates=None)
    ts, y0 = jnp.linspace(0.0, 5.0, 11), jnp.array([0.9, 0.05, 0.05])
    np.testing.assert_allclose(closed(ts, y0), plain(ts, y0), atol=1e-8)


def test_a_conserving_field_keeps_a_weighted_total():
    field = nde.hybrid.Conserving(nde.fields.MLPField(3, 8, 1, key=KEY), [1.0, 2.0, 1.0])
    ys = nde.NeuralODE(field)(jnp.linspace(0.0, 5.0, 11), jnp.array([0.3, -0.2, 1.0]))
    np.testing.assert_allclose(ys @ jnp.array([1.0, 2.0, 1.0]), 0.9, atol=1e-12)
    assert np.ptp(ys[:, 0]) > 1e-2


def one(**options):
    return experiments([([1.0, 2.0], [1.0, 2.0])], t0=0.0, **options)


PATH = nde.paths.held(np.array([0.0, 1.5]), np.ones((2, 1)))
ODE = nde.HybridODE(decay, None, {"k": 1.0})
BAD = [
    (lambda: experiments([]), ["`series` is empty"]),
    (lambda: experiments([([0.0, 1.0], [1.0])]), ["`series[0]` has times of shape (2,)"]),
    (lambda: experiments([([1.0, 0.0], [1.0, 2.0])]), ["`series[0]`", "not in order"]),
    (lambda: experiments([([0.0], [np.nan])]), ["`series[0]` has no observation"]),
    (lambda: experiments([([0.0], [1.0])], t0=0.5), ["`series[0]`", "before the solve"]),
    (lambda: one(doses=[([2.5], [[1.0]])]), ["`doses[0]`", "outside the solve"]),
    (lambda: one(doses=[([0.5], [[1.0], [2.0]])]), ["`doses[0]`", "amounts of shape (2, 1)"]),
    (lambda: one(args=[PATH]), ["`args[0]`", "ends at 1.5", "last observation at 2"]),
    (lambda: one(covariates=[1.0, 2.0]), ["`covariates` has 2 entries for 1"]),
    (lambda: one(subject=[-1]), ["`subject` is [-1]"]),
    (lambda: by_subject({"t": []}, "who", "t", []), ["`table` has no column 'who'"]),
    (lambda: Positive(-1.0), ["must be strictly between 0"]),
    (lambda: nde.mechanics.Quadratic(-1.0), ["`mass` is -1"]),
    (lambda: Gaussian(0.0), ["`std` is 0.0"]),
    (lambda: RandomEffect(Frozen(1.0), 0.1, 3), ["`center`"]),
    (lambda: RandomEffect(1.0, -0.1, 3), ["`spread` is -0.1"]),
    (lambda: PerSubject(Positive(1.0)), ["`parameter` of PerSubject"]),
    (lambda: nde.Measured(decay, jnp.ones(1)), ["`ode`", "HybridODE"]),
    (lambda: nde.Measured(ODE, jnp.ones(1), errors=0.1), ["`errors` is 0.1"]),
    (lambda: nde.Measured(ODE, lambda p: p), ["`start` has signature"]),
    (
        lambda: nde.Measured(ODE, jnp.ones(1), lambda t, y, p, x: y[0])(one()[0]),
        ["`observe` gives means of shape () ", "(1,)"],
    ),
    (
        lambda: nde.losses.negative_log_likelihood(
            nde.Measured(ODE, jnp.ones(1)), Batch((jnp.ones((1, 2)),)), KEY
        ),
        ["`batch.data` is no Experiments"],
    ),
    (
        lambda: nde.inference.measured_residuals(
            nde.Measured(ODE, jnp.ones(1), errors=Gaussian(Positive(0.1))), one()
        ),
        ["`errors`", "negative_log_likelihood"],
    ),
    (
        lambda: nde.mixed_effects(nde.Measured(ODE, jnp.ones(1)), one()),
        ["no nde.hybrid.RandomEffect"],
    ),
    (
        lambda: nde.mixed_effects(population(3), experiments(SERIES, t0=0.0, subject=[0, 0, 2])),
        ["nothing of the subjects [1]"],
    ),
    (
        lambda: nde.mixed_effects(population(2), experiments(SERIES, t0=0.0)),
        ["a subject 2 but the model is of 2"],
    ),
    (
        lambda: nde.HybridODE(decay, None, {"k": 1.0}, coordinates=nde.hybrid.Logarithms())(
            jnp.linspace(0.0, 1.0, 3), jnp.zeros(1)
        ),
        ["`y0` is [0.0]", "positive"],
    ),
]


@pytest.mark.parametrize("call, words", BAD)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=mentions(words)):
        call()
