"""Recurrent networks in continuous time against closed forms and hand-written loops."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import mentions
from scipy.linalg import expm

import nde
from nde import losses
from nde.odernn import Backwards, BayesCell, Cell, OfHidden, Reset
from nde.solvers import SolveError
from nde.train import Batch

KEYS = jax.random.split(jax.random.key(0), 8)
NAN = np.nan
TS = jnp.array([0.0, 0.3, 0.3, 1.1, 1.6])
YS = jnp.array([[0.1, NAN], [0.5, -0.2], [NAN, 0.4], [NAN, NAN], [0.7, 0.1]])


def gru(**options):
    """Three hidden entries, two channels."""
    return nde.ODERNN(
        nde.fields.MLPField(3, 5, 1, time=True, key=KEYS[0]),
        Cell(eqx.nn.GRUCell(4, 3, key=KEYS[1])),
        eqx.nn.Linear(3, 2, key=KEYS[2]),
        jnp.array([0.1, -0.2, 0.3]),
        **options,
    )


def bayes():
    return nde.ODERNN(
        nde.fields.GRUField(3, key=KEYS[0]),
        BayesCell(2, 3, 4, key=KEYS[1]),
        eqx.nn.Linear(3, 4, key=KEYS[2]),
        jnp.zeros(3),
    )


run = eqx.filter_jit(lambda model, ts, ys: model.solve(ts, ys).ys)


def test_a_linear_flow_with_linear_jumps_is_the_closed_form():
    A, B = np.array([[0.2, -1.0], [0.7, -0.3]]), np.array([[0.5, 0.1], [0.0, -0.4]])
    model = nde.ODERNN(
        lambda t, h, A: A @ h,
        lambda h, x, seen, prediction: 0.5 * h + B @ x + seen.astype(float) - prediction[0],
        lambda h: h[:1],
        jnp.array([1.0, -1.0]),
        steps_per_interval=None,
        solver=diffrax.Dopri8(),
        stepsize_controller=diffrax.PIDController(rtol=1e-11, atol=1e-11),
        dt0=0.05,
    )
    found = model.solve(TS, YS, jnp.asarray(A))
    h, t = np.array([1.0, -1.0]), 0.0
    for i in range(len(TS)):
        h, t = expm(A * (TS[i] - t)) @ h, TS[i]
        np.testing.assert_allclose(found.ys.before[i], h, rtol=1e-9)
        np.testing.assert_allclose(found.ys.prediction[i], h[:1], rtol=1e-9)
        seen = ~np.isnan(YS[i])
        if seen.any():
            h = 0.5 * h + B @ np.where(seen, YS[i], 0) + seen - h[0]
        np.testing.assert_allclose(found.ys.after[i], h, rtol=1e-9)
    assert found.stats["num_accepted_steps"] > len(TS)


def by_hand(model, ts, ys):
    """The predictions by a loop of Heun steps, two a gap, for autodiff."""
    h, t, predictions = model.start, ts[0], []
    for i in range(len(ts)):
        dt = (ts[i] - t) / 2
        for _ in range(2):
            k = model.vector_field(jnp.asarray(t), h)
            h = h + dt / 2 * (k + model.vector_field(jnp.asarray(t + dt), h + dt * k))
            t = t + dt
        predictions.append(model.readout(h))
        seen = ~np.isnan(ys[i])
        if seen.any():
            h = model.jump.cell(jnp.asarray([*np.where(seen, ys[i], 0), *seen], dtype=float), h)
    return jnp.stack(predictions)


def test_values_and_gradients_are_those_of_a_loop():
    squares = lambda call, model: jnp.sum(call(model, TS, YS) ** 2)
    unrolled = lambda model, ts, ys: by_hand(model, np.asarray(TS), np.asarray(YS))
    found, wanted = (
        eqx.filter_jit(eqx.filter_value_and_grad(functools.partial(squares, call)))(
            gru(steps_per_interval=2)
        )
        for call in (nde.ODERNN.__call__, unrolled)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_the_gru_in_continuous_time_is_its_formula_and_stays_in_the_cube():
    field, h = nde.fields.GRUField(3, key=KEYS[0]), np.array([0.4, -0.9, 0.2])
    z, r = np.split(sigmoid(np.asarray(field.gates.weight) @ h + field.gates.bias), 2)
    g = np.tanh(np.asarray(field.candidate.weight) @ (r * h) + field.candidate.bias)
    np.testing.assert_allclose(field(0.0, jnp.asarray(h)), (1 - z) * (g - h), rtol=1e-12)
    # On the faces of the cube the rate points into it, whatever the weights.
    large = jax.tree.map(lambda x: 20 * x, field)
    for i, side in enumerate(jnp.repeat(jnp.array([1.0, -1.0]), 3)):
        on_face = jnp.asarray(h).at[i % 3].set(side)
        assert side * large(0.0, on_face)[i % 3] <= 0 and np.all(np.abs(large(0.0, on_face)) <= 2)


def test_the_jump_of_bayes_is_its_formula_and_sees_observed_channels_alone():
    model, h = bayes(), jnp.array([0.4, -0.9, 0.2])
    p, x, seen = model.readout(h), np.array([7.0, 0.3]), np.array([False, True])
    told = np.array([x[1], p[1], p[3], (x[1] - p[1]) / np.exp(p[3])])
    units = np.maximum(model.jump.weights[1] @ told + model.jump.bias[1], 0)
    wanted = model.jump.cell(jnp.concatenate([jnp.zeros(4), units]), h)
    np.testing.assert_allclose(model.jump(h, jnp.asarray(x), seen, p), wanted, rtol=1e-12)


@pytest.mark.parametrize("make", [gru, bayes])
def test_padding_order_and_what_is_missing_change_nothing(make):
    """The loss and its gradient, whatever stands where nothing was observed."""
    model = make()
    loss = losses.prediction_error if make is gru else losses.prediction_likelihood

    @eqx.filter_jit
    @functools.partial(eqx.filter_value_and_grad, has_aux=True)
    def graded(model, data, mask):
        return loss(model, Batch(data, mask), KEYS[0])

    count = jnp.array([True, True, False])
    ts, ys = jnp.stack([TS, TS + 1, TS]), jnp.stack([YS, 1 - YS, YS])
    (value, metrics), grads = graded(model, (ts, ys, ~jnp.isnan(ys)), count)
    order = jnp.array([1, 2, 0])
    longer = lambda x: jnp.concatenate([x, x[:, -1:], x[:, -1:]], axis=1)[order]
    for garbage in (1e30, jnp.nan, -jnp.inf):
        unseen = jnp.isnan(ys) | ~count[:, None, None]
        padded = longer(jnp.where(unseen, garbage, ys)).at[:, -2:].set(garbage)
        mask = longer(~unseen)
        (again, _), same = graded(model, (longer(ts), padded, mask), count[order])
        np.testing.assert_allclose(again, value, rtol=1e-12)
        for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(grads), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert int(metrics["weight"]) == int(jnp.sum(~jnp.isnan(ys[:2]))) and metrics["failed"] == 0
    zero_gap = run(model, TS, YS)
    np.testing.assert_array_equal(zero_gap.before[2], zero_gap.after[1])


def test_no_prediction_sees_its_observation_or_what_follows():
    model = bayes()
    whole = run(model, TS, YS)
    for i in (1, 2, 4):
        other = run(model, TS, YS.at[i].set(jnp.array([5.0, -5.0])))
        np.testing.assert_array_equal(other.prediction[: i + 1], whole.prediction[: i + 1])
        assert np.all(other.after[i:] != whole.after[i:])
    encoder = Backwards(gru())
    contexts = encoder(TS, YS)
    np.testing.assert_array_equal(encoder(TS, YS.at[1].set(9.0))[2:], contexts[2:])
    assert np.any(encoder(TS, YS.at[1].set(9.0))[0] != contexts[0])
    # Hidden rows at the end are not seen, and neither are their times.
    hidden = jnp.concatenate([YS, jnp.full((2, 2), jnp.nan)])
    for later in ([1.6, 1.6], [2.0, 50.0]):
        found = encoder(jnp.concatenate([TS, jnp.array(later)]), hidden)
        np.testing.assert_allclose(found[:5], contexts, rtol=1e-12)
    # Backwards in time: the equation dh/dt = f is solved from the last time to the first.
    model = eqx.tree_at(lambda m: m.jump, gru(), lambda h, x, seen, prediction: h)
    flowed = nde.NeuralODE(
        model.vector_field, solver=diffrax.Heun(), stepsize_controller=diffrax.StepTo(TS[2:][::-1])
    )
    np.testing.assert_allclose(
        Backwards(model)(TS, YS)[2],
        model.readout(flowed(TS[2:][::-1], model.start)[-1]),
        rtol=1e-12,
    )


def test_a_series_may_arrive_while_the_model_is_used():
    model = gru()
    whole = run(model, TS, YS)
    step = eqx.filter_jit(model.continue_from)
    h, t = model.start, TS[0]
    for i in range(len(TS)):
        h, t = step(h, t, TS[i][None], YS[i][None]), TS[i]
        np.testing.assert_allclose(h, whole.after[i], rtol=1e-12)
    future = jnp.array([1.6, 2.0, 3.0])
    forecast = model.forecast(TS, YS, future)
    np.testing.assert_allclose(forecast[0], model.readout(h), rtol=1e-12)
    later = step(step(h, t, future[1][None], YS[3:4]), future[1], future[2][None], YS[3:4])
    np.testing.assert_allclose(forecast[2], model.readout(later), rtol=1e-12)


def test_an_lstm_flows_and_its_memory_waits_and_a_network_may_set_the_state():
    lstm = nde.ODERNN(
        OfHidden(nde.fields.MLPField(3, 4, 1, key=KEYS[3])),
        Cell(eqx.nn.LSTMCell(4, 3, key=KEYS[4])),
        lambda state: state[0],
        (jnp.zeros(3), jnp.zeros(3)),
    )
    found = run(lstm, TS, YS)
    np.testing.assert_array_equal(found.before[1][1:], found.after[1][:-1])
    assert np.all(found.before[0][1] != found.after[0][0])
    network = eqx.nn.Linear(7, 3, key=KEYS[5])
    reset = eqx.tree_at(lambda m: m.jump, gru(), Reset(network))
    found = run(reset, TS, YS)
    told = jnp.concatenate([found.before[2], jnp.array([0.0, 0.4, 0.0, 1.0])])
    np.testing.assert_allclose(found.after[2], network(told), rtol=1e-12)


def test_the_losses_are_their_formulas():
    model, data = bayes(), Batch((TS[None], YS[None]))
    loss, metrics = losses.prediction_likelihood(
        model, data, KEYS[0], weight=0.3, observation_std=0.2
    )
    found, seen = run(model, TS, YS), ~np.isnan(YS)
    m, log_s = np.split(np.asarray(found.prediction), 2, axis=1)
    nll = 0.5 * ((YS - m) / np.exp(log_s)) ** 2 + log_s + 0.5 * np.log(2 * np.pi)
    m, log_s = np.split(np.asarray(jax.vmap(model.readout)(found.after)), 2, axis=1)
    kl = np.log(0.2) - log_s + (np.exp(2 * log_s) + (m - YS) ** 2) / (2 * 0.2**2) - 0.5
    nll, kl = np.mean(np.asarray(nll)[seen]), np.mean(np.asarray(kl)[seen])
    np.testing.assert_allclose([metrics["nll"], metrics["kl"]], [nll, kl], rtol=1e-12)
    np.testing.assert_allclose(loss, nll + 0.3 * kl, rtol=1e-12)
    value, _ = losses.prediction_error(gru(), data, KEYS[0])
    error = np.asarray(run(gru(), TS, YS).prediction - YS)[seen]
    np.testing.assert_allclose(value, np.mean(error**2), rtol=1e-12)


class Explodes(eqx.Module):
    """dh/dt = rate h^2 |h|."""

    rate: jax.Array

    def __call__(self, t, h, args):
        return self.rate * h**2 * jnp.abs(h)


def exploding():
    adaptive = {"steps_per_interval": None, "solver": diffrax.Tsit5()}
    jump = lambda h, x, seen, prediction: x
    return nde.ODERNN(
        Explodes(jnp.array(1.0)), jump, lambda h: 2 * h, jnp.zeros(2), max_steps=256, **adaptive
    )


def test_a_failed_gap_says_where_and_reaches_no_gradient():
    model, high = exploding(), YS.at[2].set(40.0)
    with pytest.raises(SolveError, match=mentions(["Before ts[3]=1.1", "gap of 0.8"])) as caught:
        model.solve(TS, high)
    assert caught.value.cause == "blow_up"
    data = (jnp.stack([TS, TS]), jnp.stack([high, 0.1 * YS]))
    loss = lambda model, data, mask: losses.prediction_error(model, Batch(data, mask), KEYS[0])
    graded = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))
    (value, metrics), grad = graded(model, data, jnp.array([True, True]))
    (alone, _), wanted = graded(model, data, jnp.array([False, True]))
    assert metrics["failed"] == 0.5 and value == alone
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


MISTAKES = {
    "missing": (lambda: gru()(TS, jnp.full((5, 2), NAN)), ["`ys` is missing", "everywhere"]),
    "order": (lambda: gru()(TS.at[1].set(1.3), YS), ["not in order", "ts[2]"]),
    "backwards": (lambda: gru()(TS[::-1], YS), ["`ts` decreases", "runs forwards"]),
    "rows": (lambda: gru()(TS[:3], YS), ["`ys` has shape (5, 2)", "jax.vmap"]),
    "channels": (lambda: gru()(TS, YS[:, :1]), ["`jump`", "shape (1,)"]),
    "state": (
        lambda: eqx.tree_at(lambda m: m.jump, gru(), lambda h, x, s, p: h[:1])(TS, YS),
        ["`jump` returned", "(1,)", "(3,)"],
    ),
    "signature": (
        lambda: nde.ODERNN(gru().vector_field, lambda h, x: h, gru().readout, jnp.zeros(3)),
        ["`jump`", "(h, x, seen, prediction)"],
    ),
    "steps": (lambda: gru(steps_per_interval=0), ["`steps_per_interval` is 0"]),
    "dt0": (lambda: gru(dt0=-0.1), ["`dt0` is -0.1", "positive"]),
    "past": (lambda: gru().forecast(TS, YS, TS[:1]), ["begin at 0.0", "at 1.6"]),
    "law": (
        lambda: eqx.tree_at(lambda m: m.readout, bayes(), lambda h: h[:2])(TS, YS),
        ["`readout` returned shape (2,)", "(2 channels,)"],
    ),
    "mean": (
        lambda: losses.prediction_likelihood(gru(), Batch((TS[None], YS[None])), KEYS[0]),
        ["`readout` gives (2,)", "log standard deviation"],
    ),
    "std": (
        lambda: losses.prediction_likelihood(gru(), Batch(TS), KEYS[0], observation_std=0.0),
        ["`observation_std` is 0.0"],
    ),
    "width": (lambda: BayesCell(2, 3, 0, key=KEYS[0]), ["`width` is 0"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told(mistake):
    call, words = MISTAKES[mistake]
    with pytest.raises(ValueError, match=mentions(words)):
        call()
