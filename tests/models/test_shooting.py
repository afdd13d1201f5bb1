"""What makes oscillations trainable: shooting, a pull to the data, collocation."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from least_squares import KEY
from messages import mentions
from scipy.integrate import solve_ivp

import nde
from nde.hybrid import Positive
from nde.losses import collocation, shooting, shooting_nodes, trajectory
from nde.train import Batch, Stage

TRACES = []
TRUE = {"birth": 1.3, "death": 0.8}


def predators(t, y, p):
    TRACES.append(1)
    return jnp.stack([p["birth"] * y[0] - y[0] * y[1], y[0] * y[1] - p["death"] * y[1]])


def model(birth=1.3, death=0.8, tolerance=1e-6):
    return nde.HybridODE(
        predators,
        None,
        {"birth": Positive(birth), "death": Positive(death)},
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
    )


TS = jnp.tile(jnp.linspace(0.0, 10.0, 21), (2, 1))
YS = jax.vmap(model())(TS, jnp.array([[1.0, 2.0], [0.5, 1.0]]))
# The second one ends early, and has a gap.
ENDED = jnp.arange(21) > 14
RAGGED_TS = TS.at[1].set(jnp.where(ENDED, TS[1, 14], TS[1]))
RAGGED_YS = YS.at[1].set(jnp.where(ENDED[:, None], YS[1, 14], YS[1])).at[1, 3, 0].set(jnp.nan)
RAGGED = Batch((RAGGED_TS, RAGGED_YS))
OFF = model(1.2, 0.9)


def test_one_segment_is_the_plain_loss():
    expected, metrics = trajectory(OFF, RAGGED, KEY)
    found, ours = shooting(OFF, RAGGED, KEY, segments=1)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert float(ours["weight"]) == float(metrics["weight"])
    nodes = shooting_nodes(RAGGED_TS, RAGGED_YS, 1)
    both, _ = shooting((OFF, nodes), RAGGED, KEY, segments=1)
    share = float(metrics["weight"]) / (float(metrics["weight"]) + 4)  # the starts count too
    np.testing.assert_allclose(both, expected * share, rtol=1e-12)


def test_segments_are_solves_that_must_join():
    """The same numbers by SciPy, every segment alone."""
    rate = lambda t, y: [1.2 * y[0] - y[0] * y[1], y[0] * y[1] - 0.9 * y[1]]
    bounds, squares, gaps = [0, 7, 13, 20], [], []
    for i in range(2):
        for a, b in zip(bounds, bounds[1:], strict=False):
            end = min(b, 14) if i else b
            if a >= end:
                continue
            ts = RAGGED_TS[i, a : end + 1]
            ys = solve_ivp(
                rate, (ts[0], ts[-1]), RAGGED_YS[i, a], t_eval=ts, rtol=1e-8, atol=1e-8
            ).y.T
            squares += np.ravel((ys - RAGGED_YS[i, a : end + 1])[1:]).tolist()
            if b == end and b < (14 if i else 20):
                gaps += np.ravel(ys[-1] - RAGGED_YS[i, b]).tolist()
    value, metrics = shooting(OFF, RAGGED, KEY, segments=3, continuity=2.0)
    np.testing.assert_allclose(metrics["gap"], np.mean(np.square(gaps)), rtol=1e-4)
    expected = np.nanmean(np.square(squares)) + 2 * np.mean(np.square(gaps))
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_with_exact_data_the_optimum_is_the_truth():
    """From parameters and nodes that are wrong; the weights change and nothing is compiled again."""
    rng = np.random.default_rng(0)
    nodes = shooting_nodes(TS, YS, 5) + 0.1 * rng.normal(size=(2, 5, 2))
    optim = optax.adam(optax.cosine_decay_schedule(5e-2, 300))
    fit = functools.partial(nde.fit, data=(TS, YS), optim=optim, progress=False, key=KEY)
    loss = functools.partial(shooting, segments=5, continuity=lambda step: 0.1 + step / 100)
    start, weights = (model(2.0, 0.5), nodes), {"continuity": 1.0}
    TRACES.clear()
    fit(start, loss, steps=[Stage(1, weights=weights)])
    compiled = len(TRACES)
    TRACES.clear()
    last = Stage(150, weights={"continuity": 3.0})
    (found, _), history = fit(start, loss, steps=[Stage(150, weights=weights), last])
    assert len(TRACES) <= 1 < compiled  # a look at the loss; to compile it takes more
    values = found.physical_parameters()
    for name, value in TRUE.items():
        assert abs(values[name] - value) < 1e-2
    assert history.final_loss < 1e-3


def test_a_pull_is_a_term_of_the_equation():
    """SciPy on the pulled equation, and no pull is the plain loss."""
    batch, rate = Batch((TS[:1], YS[:1] * 1.1)), 2.0
    exact = model(1.2, 0.9, tolerance=1e-8)
    found, _ = trajectory(exact, batch, KEY, pull=lambda step: rate)

    def field(t, y):
        x = [np.interp(t, TS[0], 1.1 * YS[0, :, k]) for k in range(2)]
        own = [1.2 * y[0] - y[0] * y[1], y[0] * y[1] - 0.9 * y[1]]
        return np.asarray(own) + rate * (np.asarray(x) - y)

    ys = solve_ivp(
        field, (0, 10), 1.1 * YS[0, 0], t_eval=TS[0], rtol=1e-8, atol=1e-8, max_step=0.1
    ).y.T
    np.testing.assert_allclose(found, np.mean((ys - 1.1 * YS[0])[1:] ** 2), rtol=1e-5)
    none, _ = trajectory(exact, batch, KEY, pull=lambda step: 0.0)
    np.testing.assert_allclose(none, trajectory(exact, batch, KEY)[0], rtol=1e-4)
    grads = eqx.filter_grad(lambda m: trajectory(m, RAGGED, KEY, pull=lambda s: 1.0)[0])(OFF)
    assert all(np.all(np.isfinite(g)) and np.all(g != 0) for g in jax.tree.leaves(grads))


def test_collocation_is_the_error_of_the_field():
    states, rates = nde.symbolic.slopes(TS[0], YS)
    data = tuple(map(jnp.asarray, (jnp.tile(TS[0], 2), states, rates)))
    found = collocation(OFF, Batch(data), KEY)
    own = np.stack([1.2 * states[:, 0], -0.9 * states[:, 1]], axis=1)
    product = states.prod(axis=1)
    field = own + np.stack([-product, product], axis=1)
    np.testing.assert_allclose(found, np.mean((field - rates) ** 2), rtol=1e-12)
    assert collocation(model(), Batch(data), KEY) < found / 3


BAD = [
    (lambda: shooting(OFF, RAGGED, KEY, segments=21), ["`segments` is 21", "20 intervals"]),
    (
        lambda: shooting((OFF, jnp.ones((2, 3, 2))), RAGGED, KEY, segments=4),
        ["`nodes` has shape (2, 3, 2)", "(2, 4, 2)"],
    ),
    (lambda: trajectory(OFF, RAGGED, KEY, pull=1.0), ["`pull` is 1.0"]),
    (lambda: collocation(OFF, RAGGED, KEY), ["(ts, ys, slopes)"]),
]


@pytest.mark.parametrize("call, words", BAD)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=mentions(words)):
        call()
