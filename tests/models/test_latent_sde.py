"""The latent SDE against closed forms: divergences, gradients, marginals, what its encoder sees."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import mentions

import nde
from nde import losses
from nde._stochastic import Diffusion
from nde.latent_sde import Gaussian, GRUEncoder, LatentSDE, PosteriorDrift, PosteriorMarginals

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 8)


class Line(eqx.Module):
    """rate z, whatever else is known."""

    rate: jax.Array

    def __call__(self, t, z, context):
        return self.rate * z


class Level(eqx.Module):
    """The same number always."""

    level: jax.Array

    def __call__(self, t, z, args):
        return jnp.broadcast_to(self.level, z.shape)


def fixed(*values):
    return lambda context: jnp.array(values)


def ou_pair(prior=-2.0, posterior=-1.0, **options):
    """Ornstein-Uhlenbeck processes of noise 1/2 that start at 1: the pair with a known divergence."""
    return LatentSDE(
        lambda ts, ys: jnp.zeros((ts.shape[0], 1)),
        PosteriorDrift(fixed(1.0, -60.0), Line(jnp.array(posterior))),
        Line(jnp.array(prior)),
        Level(jnp.array(0.5)),
        lambda z: z,
        Gaussian(jnp.ones(1), jnp.zeros(1)),
        observation_std=0.1,
        **options,
    )


@eqx.filter_jit
def path_divergences(model, ts, keys, low_variance=False):
    ys = jnp.ones((ts.shape[0], 1))
    run = lambda key: model.evidence(ts, ys, low_variance=low_variance, key=key).kl_path
    return jax.vmap(run)(keys)


@pytest.mark.parametrize(("steps", "euler"), [(50, 1.01804), (100, 1.01229)])
def test_the_path_divergence_of_two_ou_processes_is_the_closed_form(steps, euler):
    """Exactly the Euler sum at that step, and near the limit; its spread is that of the paths, .488."""
    ts = jnp.linspace(0.0, 1.0, steps + 1)
    values = np.asarray(path_divergences(ou_pair(), ts, jax.random.split(KEY, 10000)))
    error = values.std() / 100
    assert abs(values.std() - 0.488) < 0.02
    assert abs(values.mean() - euler) < 2 * error
    if steps == 100:
        assert abs(values.mean() - 1.00658) < 2 * error
    # The low-variance estimate has the same mean.
    low = np.asarray(path_divergences(ou_pair(), ts, jax.random.split(KEY, 10000), True))
    assert abs(low.mean() - euler) < 3 * low.std() / 100


def test_equal_drifts_have_no_divergence():
    ts, keys = jnp.linspace(0.0, 1.0, 9), jax.random.split(KEY, 8)
    model = ou_pair(prior=-1.0)
    assert np.all(path_divergences(model, ts, keys) == 0)
    assert np.all(path_divergences(model, ts, keys, True) == 0)
    assert np.any(path_divergences(ou_pair(prior=-1.01), ts, keys) > 0)


def small(posterior=None, both_ways=False, **options):
    """Two hidden entries, two channels, networks everywhere."""
    if posterior is None:
        field = nde.fields.MLPField(2, 4, 1, context=3, time=True, key=KEYS[0])
        posterior = PosteriorDrift(eqx.nn.Linear(3, 4, key=KEYS[1]), field)
    return LatentSDE(
        GRUEncoder(2, 4, 3, both_ways=both_ways, time_scale=2.0, key=KEYS[2]),
        posterior,
        nde.fields.MLPField(2, 4, 1, key=KEYS[3]),
        nde.fields.OwnNoise(2, 3, least=0.1, most=1.0, key=KEYS[4]),
        eqx.nn.Linear(2, 2, key=KEYS[5]),
        Gaussian(jnp.zeros(2), jnp.zeros(2)),
        observation_std=0.3,
        **options,
    )


def marginals():
    identity = lambda x: x
    net = nde.fields.MLPField(
        3, 4, 1, out_size=4, time=True, final_activation=identity, key=KEYS[6]
    )
    return PosteriorMarginals(net, 2.0)


TS = jnp.array([0.0, 0.3, 0.4, 1.0, 1.6])
YS = jnp.array([[0.1, jnp.nan], [0.5, -0.2], [jnp.nan, jnp.nan], [jnp.nan, 0.3], [0.7, 0.1]])


def by_hand(model, ts, ys, key, low_variance):
    """The negative ELBO by a loop over Euler steps, from the same normals, for autodiff."""
    key_start, key_path = jax.random.split(key)
    contexts = model.encoder(ts, ys)
    mean, log_std = jnp.split(model.posterior.initial(contexts[0]), 2)
    z = mean + jnp.exp(log_std) * jax.random.normal(key_start, (2,))
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    held = eqx.combine(jax.lax.stop_gradient(params), rest)
    p0, total, n = model.start, 0.0, 0
    ratio = log_std - p0.log_std
    kl = jnp.sum(
        ((mean - p0.mean) ** 2 / jnp.exp(2 * p0.log_std) + jnp.exp(2 * ratio) - 1) / 2 - ratio
    )
    stuck = jax.lax.stop_gradient(contexts)
    for i in range(len(ts)):
        seen = ~jnp.isnan(ys[i])
        apart = (model.decoder(z) - jnp.where(seen, ys[i], 0)) / 0.3
        each = -(apart**2) / 2 - jnp.log(0.3) - 0.5 * jnp.log(2 * jnp.pi)
        total = total + jnp.sum(jnp.where(seen, each, 0))
        if i + 1 == len(ts):
            break
        h = (ts[i + 1] - ts[i]) / 2
        for j in range(2):
            t = ts[i] + j * h
            dw = jnp.sqrt(h) * jax.random.normal(jax.random.fold_in(key_path, n), (2,))
            f = model.posterior.field(t, z, contexts[i + 1])
            prior, g = model.prior(t, z, None), model.diffusion(t, z, None)
            kl = kl + jnp.sum(((f - prior) / g) ** 2) / 2 * h
            if low_variance:
                apart = held.posterior.field(t, z, stuck[i + 1]) - held.prior(t, z, None)
                kl = kl + jnp.sum(apart / held.diffusion(t, z, None) * dw)
            z, n = z + f * h + g * dw, n + 1
    return kl - total


@pytest.mark.parametrize("low_variance", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_gradient_of_the_simulated_bound_is_that_of_its_steps(low_variance):
    model = small(steps_per_interval=2)
    bound = lambda model: -model.evidence(TS, YS, low_variance=low_variance, key=KEY).elbo()
    value, got = eqx.filter_jit(eqx.filter_value_and_grad(bound))(model)
    unrolled = lambda model: by_hand(model, TS, YS, KEY, low_variance)
    exact_value, exact = eqx.filter_jit(eqx.filter_value_and_grad(unrolled))(model)
    np.testing.assert_allclose(value, exact_value, rtol=1e-12)
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(exact))
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree_util.tree_leaves(exact), strict=True
    )
    for (path, x), y in pairs:
        if "observation_std" not in jax.tree_util.keystr(path):
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10 * scale)


class Bridge(eqx.Module):
    """The drift that takes a Wiener process to where it is observed with noise `std` at time 1."""

    weight: jax.Array
    std: float = eqx.field(static=True)

    def __call__(self, t, z, context):
        return self.weight * (context - z) / (self.std**2 + 1 - t)


def test_the_gradient_sticks_where_the_posterior_is_right():
    """At the exact posterior the low-variance bound is log p(x) path by path, but for the steps."""
    std, steps = 0.5, 100
    ts = jnp.linspace(0.0, 1.0, steps + 1)
    ys = jnp.full((steps + 1, 1), jnp.nan).at[-1].set(1.5)
    model = LatentSDE(
        lambda ts, ys: jnp.broadcast_to(ys[-1], ys.shape),
        PosteriorDrift(fixed(0.0, -60.0), Bridge(jnp.array(1.0), std)),
        Level(jnp.array(0.0)),
        Level(jnp.array(1.0)),
        lambda z: z,
        Gaussian(jnp.zeros(1), jnp.full(1, -60.0)),
        observation_std=std,
    )

    @eqx.filter_jit
    def bounds(low_variance, keys):
        def bound(weight, key):
            weighed = eqx.tree_at(lambda m: m.posterior.field.weight, model, weight)
            return weighed.evidence(ts, ys, low_variance=low_variance, key=key).elbo()

        run = jax.value_and_grad(bound)
        return jax.vmap(run, (None, 0))(jnp.array(1.0), keys)

    values, gradients = bounds(True, jax.random.split(KEY, 64))
    exact = jax.scipy.stats.norm.logpdf(1.5, 0.0, jnp.sqrt(1 + std**2))
    assert np.std(values) < 0.2 and abs(np.mean(values) - exact) < 0.05
    _, plain = bounds(False, jax.random.split(KEY, 64))
    assert jnp.std(gradients) < jnp.std(plain) / 20


def test_the_drift_of_marginals_moves_them():
    """A particle moved by the drift has the mean and the spread that the network says."""
    model = small(marginals(), both_ways=True, steps_per_interval=40)
    context = (TS, model.encoder(TS, YS))
    run = jax.jit(jax.vmap(lambda key: model.solve(TS, YS, key=key).ys[0]))
    zs = np.asarray(run(jax.random.split(KEY, 8192)))
    for i in range(len(TS)):
        exact = model.posterior.at(TS[i], context)
        std = np.exp(exact.log_std)
        assert np.all(np.abs(zs[:, i].mean(0) - exact.mean) < 4 * std / np.sqrt(8192) + 0.01)
        assert np.all(np.abs(zs[:, i].std(0) / std - 1) < 0.05)


def test_matching_and_simulation_estimate_one_bound():
    """T times the rate at random times, and all observations: no factor is missing."""
    model = small(marginals(), both_ways=True, steps_per_interval=40)
    keys = jax.random.split(KEY, 4096)
    simulated = jax.jit(jax.vmap(lambda key: model.evidence(TS, YS, key=key)))(keys)
    matched = jax.jit(jax.vmap(lambda key: model.matched_evidence(TS, YS, samples=4, key=key)))(
        keys
    )
    for one, other in zip(simulated, matched, strict=True):
        error = np.hypot(one.std(), other.std()) / np.sqrt(4096)
        assert abs(one.mean() - other.mean()) < 4 * error + 0.01 * abs(one.mean())


def test_the_encoder_sees_what_was_observed_and_when():
    model = small()
    contexts = model.encoder(TS, YS)
    before = model.encoder(TS, YS.at[0].set(5.0))
    np.testing.assert_array_equal(contexts[1:], before[1:])  # backwards: the future alone
    assert np.any(contexts[0] != before[0])
    without = jnp.array([0, 1, 3, 4])  # a row that is missing changes no other
    np.testing.assert_allclose(
        model.encoder(TS[without], YS[without]), contexts[without], rtol=1e-12
    )
    slower = GRUEncoder(2, 4, 3, time_scale=4.0, key=KEYS[2])
    np.testing.assert_allclose(slower(2 * TS, YS), contexts, rtol=1e-12)
    both = small(both_ways=True).encoder
    assert np.any(both(TS, YS)[4] != both(TS, YS.at[0].set(5.0))[4])


def test_the_next_observation_steers_and_later_ones_are_forecast():
    model = small()
    drift = lambda ys: model.posterior.drift(
        jnp.array(0.35),
        jnp.ones(2),
        (TS, model.encoder(TS, ys)),
        Diffusion(model.diffusion, "diagonal"),
    )
    assert np.all(drift(YS) == drift(YS.at[1].set(9.0)))  # at 0.3, past
    assert np.any(drift(YS) != drift(YS.at[3].set(9.0)))
    future = jnp.array([2.0, 2.5])
    forecast = jax.jit(lambda ys: model.forecast(TS, ys, future, key=KEY))
    assert forecast(YS).shape == (2, 2) and np.any(forecast(YS) != forecast(YS + 1))
    assert model.sample(TS, key=KEY).shape == YS.shape


def test_the_losses_weigh_the_divergence_and_count_examples_alone():
    model = small(marginals(), both_ways=True)
    data = (jnp.stack([TS, TS, TS]), jnp.stack([YS, YS + 1, 9 * YS]))
    mask = jnp.array([True, True, False])
    batch = nde.train.Batch(data, mask, jnp.array(5))
    for loss in (losses.evidence, losses.matched_evidence):
        value, parts = loss(model, batch, KEY, kl_weight=lambda step: 0.1 * step)
        total = -parts["log_likelihood"] + 0.5 * (parts["kl_start"] + parts["kl_path"])
        np.testing.assert_allclose(value, total, rtol=1e-12)
    other = nde.train.Batch((data[0], data[1].at[2].set(0.0)), mask, jnp.array(5))
    again, _ = losses.matched_evidence(model, other, KEY, kl_weight=0.5)
    np.testing.assert_allclose(again, value, rtol=1e-12)


def changed(**parts):
    model = ou_pair()
    return LatentSDE(**({f: getattr(model, f) for f in model.__dataclass_fields__} | parts))


BAD = {
    "missing everywhere": (
        lambda: small().evidence(TS, jnp.full((5, 2), jnp.nan), key=KEY),
        ["`ys` is missing", "everywhere"],
    ),
    "shape": (lambda: small().evidence(TS, YS[:3], key=KEY), ["`ys` has shape (3, 2)", "jax.vmap"]),
    "zero": (
        lambda: changed(diffusion=Level(jnp.array(0.0))),
        ["`diffusion` is", "zero", "OwnNoise"],
    ),
    "no lower bound": (
        lambda: nde.fields.OwnNoise(2, 3, least=0.0, most=1.0, key=KEY),
        ["`least` is 0.0", "0 < least"],
    ),
    "no marginals": (
        lambda: small().matched_evidence(TS, YS, key=KEY),
        ["`posterior` is a PosteriorDrift", "PosteriorMarginals"],
    ),
    "Stratonovich": (
        lambda: small(solver=diffrax.Heun()).evidence(TS, YS, low_variance=True, key=KEY),
        ["`low_variance`", "Heun", "diffrax.Euler"],
    ),
    "single": (lambda: small().evidence(TS[:1], YS[:1], key=KEY), ["`ts` has one time"]),
    "no key": (lambda: small().evidence(TS, YS, key=None), ["`key` is None"]),
    "initial": (
        lambda: small(PosteriorDrift(lambda c: c, Line(jnp.array(1.0)))).evidence(TS, YS, key=KEY),
        ["`initial` returned shape (3,)", "(2 latent,)"],
    ),
    "std": (
        lambda: changed(observation_std=-1.0),
        ["`observation_std` is -1.0", "positive"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_says_what_is_wrong(case):
    call, words = BAD[case]
    with pytest.raises(ValueError, match=mentions(words)):
        call()
