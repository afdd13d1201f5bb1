"""The latent ODE against a linear model whose bound is known, and what its encoders may see."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import mentions
from scipy.stats import multivariate_normal

import nde
from nde import losses
from nde.latent_ode import Gaussian, GRUEncoder, LatentODE
from nde.odernn import Backwards, Cell
from nde.train import Batch

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 8)
NAN = np.nan
TS = jnp.array([0.0, 0.3, 0.4, 1.0, 1.6])
YS = jnp.array([[0.1, NAN], [0.5, -0.2], [NAN, NAN], [NAN, 0.3], [0.7, 0.1]])
RATE, MEAN, STD, NOISE = -0.6, 0.4, 0.8, 0.3
READ = np.array([1.5, -0.7])


class Linear(eqx.Module):
    """rate z."""

    rate: jax.Array

    def __call__(self, t, z, args):
        return self.rate * z


def exact_posterior():
    """Mean and standard deviation of z(t0) given the observed values, of a linear model of one entry."""
    seen = ~np.isnan(YS)
    slopes = (np.exp(RATE * np.asarray(TS))[:, None] * READ)[seen]
    variance = 1 / (1 / STD**2 + np.sum(slopes**2) / NOISE**2)
    values = np.asarray(YS)[seen]
    mean = variance * (MEAN / STD**2 + np.sum(slopes * values) / NOISE**2)
    return mean, np.sqrt(variance), slopes, values


def linear_model():
    mean, std, *_ = exact_posterior()
    tight = diffrax.PIDController(rtol=1e-11, atol=1e-11)
    return LatentODE(
        lambda ts, ys: jnp.zeros((ts.shape[0], 1)),
        lambda context: jnp.array([mean, np.log(std)]),
        Linear(jnp.array(RATE)),
        lambda z: jnp.asarray(READ) * z,
        Gaussian(jnp.array([MEAN]), jnp.log(jnp.array([STD]))),
        observation_std=NOISE,
        solver=diffrax.Dopri8(),
        stepsize_controller=tight,
    )


def test_the_bound_of_the_exact_posterior_is_the_likelihood_at_every_draw():
    """log p(x | z) + log p0(z) - log q(z) is log p(x), whatever z: the bound is tight, not only in mean."""
    model, (mean, std, slopes, values) = linear_model(), exact_posterior()
    keys = jax.random.split(KEY, 16)
    evidence = jax.jit(jax.vmap(lambda key: model.evidence(TS, YS, key=key)))(keys)
    zs = jax.vmap(Gaussian(jnp.array([mean]), jnp.log(jnp.array([std]))).draw)(keys)
    normal = lambda x, m, s: multivariate_normal(m, s**2).logpdf(x)
    before = normal(zs, MEAN, STD).reshape(-1) - normal(zs, mean, std).reshape(-1)
    covariance = STD**2 * np.outer(slopes, slopes) + NOISE**2 * np.eye(len(values))
    likelihood = multivariate_normal(MEAN * slopes, covariance).logpdf(values)
    np.testing.assert_allclose(evidence.log_likelihood + before, likelihood, rtol=1e-8)
    ratio = std / STD
    divergence = (ratio**2 + ((mean - MEAN) / STD) ** 2 - 1) / 2 - np.log(ratio)
    np.testing.assert_allclose(evidence.kl_start, divergence, rtol=1e-12)
    assert np.all(evidence.kl_path == 0)
    target = YS.at[1, 0].set(jnp.nan)
    fewer = model.evidence(TS, YS, targets=target, key=keys[0]).log_likelihood
    z = zs[0, 0] * np.exp(RATE * 0.3) * READ[0]
    gone = normal(0.5, z, NOISE)
    np.testing.assert_allclose(fewer + gone, evidence.log_likelihood[0], rtol=1e-8)


def encoder_of(kind):
    if kind == "GRU":
        return GRUEncoder(2, 4, 3, time_scale=2.0, key=KEYS[2])
    return Backwards(
        nde.ODERNN(
            nde.fields.MLPField(4, 4, 1, key=KEYS[0]),
            Cell(eqx.nn.GRUCell(4, 4, key=KEYS[1])),
            eqx.nn.Linear(4, 3, key=KEYS[2]),
            jnp.full(4, 0.1),
        )
    )


def small(kind="GRU", **options):
    """Two hidden entries, two channels, networks everywhere."""
    return LatentODE(
        encoder_of(kind),
        eqx.nn.Linear(3, 4, key=KEYS[3]),
        nde.fields.MLPField(2, 4, 1, key=KEYS[4]),
        eqx.nn.Linear(2, 2, key=KEYS[5]),
        Gaussian(jnp.zeros(2), jnp.zeros(2)),
        **({"observation_std": 0.3} | options),
    )


@eqx.filter_jit
@functools.partial(eqx.filter_value_and_grad, has_aux=True)
def graded(model, data, mask, keys, **options):
    batch = Batch(data, mask, jnp.array(5), keys=keys)
    return losses.evidence(model, batch, KEY, per="value", **options)


@pytest.mark.parametrize("kind", ["GRU", "ODE-RNN"])
def test_padding_order_and_what_is_missing_change_nothing(kind):
    """The bound and its gradient, whatever stands where nothing was observed."""
    model, count = small(kind), jnp.array([True, True, False])
    ts, ys = jnp.stack([TS, TS + 1, TS]), jnp.stack([YS, 1 - YS, YS])
    (value, metrics), grads = graded(model, (ts, ys, ~jnp.isnan(ys)), count, KEYS[:3])
    assert int(metrics["weight"]) == int(jnp.sum(~jnp.isnan(ys[:2]))) and metrics["failed"] == 0
    order = jnp.array([1, 2, 0])
    longer = lambda x: jnp.concatenate([x, x[:, -1:], x[:, -1:]], axis=1)[order]
    for garbage in (1e30, jnp.nan, -jnp.inf):
        unseen = jnp.isnan(ys) | ~count[:, None, None]
        padded = longer(jnp.where(unseen, garbage, ys)).at[:, -2:].set(garbage)
        data = (longer(ts), padded, longer(~unseen))
        (again, _), same = graded(model, data, count[order], KEYS[order])
        np.testing.assert_allclose(again, value, rtol=1e-11)
        for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", ["GRU", "ODE-RNN"])
def test_neither_encoder_nor_forecast_sees_what_is_hidden(kind):
    """Rows that the encoder is not shown may hold anything, at any later time."""
    model, cut = small(kind), 3
    posterior = eqx.filter_jit(model.posterior)
    alone = posterior(TS[:cut], YS[:cut])
    hidden = jnp.where(jnp.arange(5)[:, None] < cut, YS, jnp.nan)
    for later in (TS[cut:], jnp.array([3.0, 70.0])):
        found = posterior(jnp.concatenate([TS[:cut], later]), hidden)
        np.testing.assert_allclose(found.mean, alone.mean, rtol=1e-12)
    assert np.any(posterior(TS, YS).mean != alone.mean)


def test_training_on_forecasts_encodes_what_is_shown_and_counts_all():
    model, mask = small(), jnp.array([True])
    shown = lambda ts: ts <= 0.4

    @eqx.filter_jit
    def parts(ys):
        batch = Batch((TS[None], ys[None]), mask, keys=KEYS[:1])
        return losses.evidence(model, batch, KEY, per="value", shown=shown)[1]

    alone, count = model.posterior(TS[:3], YS[:3]).kl(model.start), float(jnp.sum(~jnp.isnan(YS)))
    found, changed = parts(YS), parts(YS.at[3:].add(5.0))
    np.testing.assert_allclose(found["kl_start"], alone / count, rtol=1e-12)
    np.testing.assert_allclose(changed["kl_start"], alone / count, rtol=1e-12)
    assert changed["log_likelihood"] < found["log_likelihood"]


def test_a_forecast_is_the_same_solution_at_other_times():
    model = small()
    run = lambda method: eqx.filter_jit(method)
    whole = run(model.forecast)(TS, YS, jnp.linspace(0.0, 4.0, 9), key=KEY)
    part = run(model.forecast)(TS, YS, jnp.array([1.0, 4.0]), key=KEY)
    np.testing.assert_allclose(part, whole[jnp.array([2, 8])], rtol=1e-4)
    np.testing.assert_allclose(run(model)(TS, YS, key=KEY)[3], part[0], rtol=1e-3)
    draws = jax.vmap(lambda key: model.sample(TS, key=key))(KEYS)
    assert draws.shape == (8, 5, 2) and np.all(np.std(draws, axis=0) > 0)


def test_the_loss_is_a_mean_over_draws_and_weighs_the_divergence():
    model = small()
    data, mask = (jnp.stack([TS, TS]), jnp.stack([YS, YS + 1])), jnp.array([True, True])
    batch = Batch(data, mask, jnp.array(5), keys=KEYS[:2])
    loss, parts = losses.evidence(
        model, batch, KEY, samples=3, kl_weight=lambda step: 0.1 * step, per="series"
    )
    wanted = 0.0
    for ts, ys, key in zip(*data, KEYS, strict=False):
        bound = jax.vmap(lambda key: model.evidence(ts, ys, key=key).elbo(0.5))  # noqa: B023
        wanted = wanted - jnp.mean(bound(jax.random.split(key, 3))) / 2
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)
    assert parts["weight"] == 2 and parts["nfe"] > 3


class Explodes(eqx.Module):
    """dz/dt = rate |z|^3."""

    rate: jax.Array

    def __call__(self, t, z, args):
        return self.rate * jnp.abs(z) ** 3


def test_a_failed_solve_does_not_count_and_reaches_no_gradient():
    largest = lambda ts, ys: jnp.full((ts.shape[0], 3), jnp.nanmax(jnp.abs(ys)))
    model = eqx.tree_at(
        lambda m: (m.encoder, m.vector_field, m.initial),
        small(max_steps=256),
        (largest, Explodes(jnp.array(1.0)), lambda c: jnp.append(c[:2], jnp.array([-3.0, -3.0]))),
    )
    data = (jnp.stack([TS, TS]), jnp.stack([50 * YS, 0.01 * YS]))
    (value, metrics), grad = graded(model, data, jnp.array([True, True]), KEYS[:2])
    (alone, _), wanted = graded(model, data, jnp.array([False, True]), KEYS[:2])
    assert metrics["failed"] == 0.5 and value == alone and np.isfinite(value)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def evidence(model, ts=TS, ys=YS, key=KEY, **options):
    return model.evidence(ts, ys, key=key, **options)


def with_part(part=None, value=None):
    """A model without an encoder to compile, and one part of it exchanged."""
    parts = {f: getattr(small(), f) for f in ("initial", "vector_field", "decoder", "start")}
    encoder = lambda ts, ys: jnp.zeros((ts.shape[0], 3))
    parts |= {"encoder": encoder} | ({} if part is None else {part: value})
    return LatentODE(**parts, observation_std=1.0)


MISTAKES = {
    "missing": (lambda: evidence(with_part(), ys=NAN * YS), ["`ys` is missing", "everywhere"]),
    "order": (lambda: evidence(with_part(), TS.at[1].set(0.7)), ["not in order", "ts[2]"]),
    "backwards": (lambda: evidence(with_part(), TS[::-1]), ["`ts` decreases", "runs forwards"]),
    "rows": (lambda: evidence(with_part(), ys=YS[:3]), ["`ys` has shape (3, 2)", "jax.vmap"]),
    "integers": (lambda: evidence(with_part(), ys=jnp.ones((5, 2), int)), ["`ys` has dtype int64"]),
    "no key": (lambda: evidence(with_part(), key=None), ["`key` is None"]),
    "std": (lambda: small(observation_std=[0.1, 0.0]), ["`observation_std` is", "positive"]),
    "law": (lambda: with_part("start", jnp.zeros(2)), ["`start` is", "nde.latent_ode.Gaussian"]),
    "field": (
        lambda: evidence(with_part("vector_field", lambda t, z, args: z[:1])),
        ["`vector_field` returned shape (1,)", "(2,)"],
    ),
    "encoder": (
        lambda: evidence(with_part("encoder", lambda ts, ys: jnp.zeros(3))),
        ["`encoder` returned shape (3,)", "(times, context)"],
    ),
    "initial": (
        lambda: evidence(with_part("initial", lambda c: c)),
        ["`initial` returned shape (3,)", "(2 latent,)"],
    ),
    "sizes": (
        lambda: evidence(with_part("start", Gaussian(jnp.zeros(3), jnp.zeros(3)))),
        ["`initial` gives", "(2,)", "(3,)"],
    ),
    "decoder": (
        lambda: evidence(with_part("decoder", lambda z: z[:1])),
        ["`decoder` gives (1,)", "(2,)"],
    ),
    "past": (
        lambda: with_part().forecast(TS + 1, YS, TS, key=KEY),
        ["`future` begins at 0.0", "at 1.0"],
    ),
    "per": (
        lambda: losses.evidence(with_part(), Batch((TS[None], YS[None])), KEY, per="batch"),
        ["`per` is 'batch'", '"value"'],
    ),
    "samples": (
        lambda: losses.evidence(with_part(), Batch((TS[None], YS[None])), KEY, samples=0),
        ["`samples` is 0"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told(mistake):
    call, words = MISTAKES[mistake]
    with pytest.raises(ValueError, match=mentions(words)):
        call()
