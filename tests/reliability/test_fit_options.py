"""Validation, stages, averages, turns and the other options of `fit`, against the same training written
out in NumPy."""

import csv
import functools
import itertools
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from least_squares import DATA, KEY, X, Y, fit, squares

import nde
from nde._training import program
from nde.train import Average, JSONLines, Stage, Turn, Validation

W = {"w": jnp.zeros(3)}
HELD_OUT = jax.tree.map(lambda leaf: leaf[6:], DATA)
SEEN = jax.tree.map(lambda leaf: leaf[:6], DATA)


def line(model, batch, key):
    x, y = batch.data
    return nde.losses.mse(x @ model["w"], y, batch.mask)


def told(model, batch, key):
    """The loss and, as metrics, the parameters that it saw."""
    return line(model, batch, key), {f"w{i}": model["w"][i] for i in range(3)}


def shaken(model, batch, key):
    """With a random force on the parameters, so that the last model is not the best."""
    value, metrics = told(model, batch, key)
    return value + jax.random.normal(key, (3,)) @ model["w"], metrics


def parameters(history):
    """What `told` reports: the parameters before every step, shape (steps, 3)."""
    return np.stack([history[f"w{i}"] for i in range(3)], axis=1)


def gradient(w, rows=slice(None)):
    return 2 * X[rows].T @ (X[rows] @ w - Y[rows]) / len(Y[rows])


NOISY = {"optim": optax.sgd(0.25), "batch_size": 2}


def test_the_best_validated_model_is_returned_and_training_knows_nothing_of_it():
    plain, reference = fit(W, shaken, SEEN, steps=60, **NOISY)
    model, history = fit(
        W, shaken, SEEN, steps=60, validation=Validation(HELD_OUT, 7, loss=line), **NOISY
    )
    np.testing.assert_array_equal(parameters(history), parameters(reference))
    np.testing.assert_array_equal(history["loss"], reference["loss"])
    seen = [*range(6, 60, 7), 59]
    np.testing.assert_array_equal(np.flatnonzero(np.isfinite(history["validation"])), seen)
    after = np.concatenate([parameters(reference)[1:], np.asarray(plain["w"])[None]])[seen]
    expected = [np.mean((X[6:] @ w - Y[6:]) ** 2) for w in after]
    np.testing.assert_allclose(history["validation"][seen], expected, rtol=1e-12)
    assert 0 < np.argmin(expected) < len(seen) - 1  # neither the first nor the last
    assert history.best_step == seen[np.argmin(expected)]
    np.testing.assert_array_equal(model["w"], after[np.argmin(expected)])


def test_patience_ends_the_training_where_the_validations_say():
    held_out = functools.partial(Validation, HELD_OUT, every=3, loss=line)
    _, whole = fit(W, shaken, SEEN, steps=120, validation=held_out(), **NOISY)
    model, history = fit(W, shaken, SEEN, steps=120, validation=held_out(patience=4), **NOISY)
    values, best, waited = whole["validation"], np.inf, 0
    for step in np.flatnonzero(np.isfinite(values)):
        better = values[step] < best
        best, waited = (values[step], 0) if better else (best, waited + 1)
        if waited == 4:
            break
    assert len(history) == step + 1 < 120
    np.testing.assert_array_equal(history["loss"], whole["loss"][: step + 1])
    error = X[6:] @ np.asarray(model["w"]) - Y[6:]
    np.testing.assert_allclose(np.mean(error**2), best, rtol=1e-12)


def test_validation_in_parts_is_validation_at_once():
    def history(size):
        validation = Validation(DATA, every=2, batch_size=size, loss=line)
        return fit(W, line, SEEN, steps=4, validation=validation)[1]["validation"]

    np.testing.assert_allclose(history(3), history(None), rtol=1e-12)


def test_stages_are_data_of_one_compiled_step():
    traces = itertools.count()

    def loss(model, batch, key):
        next(traces)
        penalty = batch.weights["size"] * jnp.sum(model["w"] ** 2)
        return squares(model, batch, key) + penalty, {"horizon": batch.horizon}

    stages = [
        Stage(5, horizon=0.5, weights={"size": 0.3}, frozen=lambda m: m["scale"]),
        Stage(4, rate=0.5, weights={"size": 0.0}),
        Stage(3, weights={"size": 0.1}, frozen=lambda m: m["w"]),
    ]
    start = {"w": jnp.ones(3), "scale": jnp.ones(())}
    model, history = fit(start, loss, steps=stages)
    assert next(traces) == 1
    np.testing.assert_array_equal(history["horizon"], [0.5] * 5 + [1.0] * 7)
    np.testing.assert_array_equal(history["stage"], [0] * 5 + [1] * 4 + [2] * 3)
    w, scale = np.ones(3), 1.0
    for rate, weight, w_trains, scale_trains, steps in (
        (0.1, 0.3, 1, 0, 5),
        (0.05, 0.0, 1, 1, 4),
        (0.1, 0.1, 0, 1, 3),
    ):
        for _ in range(steps):
            error = scale * X @ w - Y
            dw = 2 * scale * X.T @ error / 10 + 2 * weight * w
            dscale = 2 * (X @ w) @ error / 10
            w, scale = w - rate * w_trains * dw, scale - rate * scale_trains * dscale
    np.testing.assert_allclose(model["w"], w, rtol=1e-12)
    np.testing.assert_allclose(model["scale"], scale, rtol=1e-12)


@pytest.mark.parametrize(
    "average", [Average(decay=0.8), Average(start=5, every=3), Average(decay=0.7, start=4)]
)
def test_averages_are_those_of_the_parameters_and_are_validated(average):
    plain, history = fit(W, told, steps=20, **NOISY)
    after = np.concatenate([parameters(history)[1:], np.asarray(plain["w"])[None]])
    model, averaged = fit(
        W, told, steps=20, average=average, validation=Validation(DATA, every=20), **NOISY
    )
    np.testing.assert_array_equal(averaged["loss"], history["loss"])
    mean, n = after[average.start - 1] if average.start else np.zeros(3), 0
    for step in range(average.start, 20, average.every):
        weight = max(1 / (n + 1), 0 if average.decay is None else 1 - average.decay)
        mean, n = mean + weight * (after[step] - mean), n + 1
    np.testing.assert_allclose(model["w"], mean, rtol=1e-12)
    np.testing.assert_allclose(averaged["validation"][-1], np.mean((X @ mean - Y) ** 2), rtol=1e-12)


def test_players_take_turns_with_one_stream_of_keys():
    """max over c of min over g of  g.c - c.c/2 + noise: both written out, with momentum for c."""

    def value(model, key):
        return model["g"] @ model["c"] - model["c"] @ model["c"] / 2 + jax.random.normal(key, ())

    def critic(model, batch, key):
        return -value(model, key) + 0.1 * jnp.sum(batch.data), {"drawn": jax.random.normal(key, ())}

    def generator(model, batch, key):
        return value(model, key), {"mine": jnp.ones(())}

    start = {"g": jnp.array([1.0, -2.0]), "c": jnp.array([0.5, 0.5])}
    turns = [
        Turn(critic, optax.sgd(0.1, momentum=0.9), lambda m: m["c"], steps=2),
        Turn(generator, optax.sgd(0.2), lambda m: m["g"]),
    ]
    clip = lambda m: m | {"c": jnp.clip(m["c"], -0.9, 0.9)}
    data = jnp.arange(7.0)
    model, history = nde.fit(
        start, turns, data, steps=9, batch_size=3, project=clip, key=KEY, progress=False
    )
    g, c, momentum = np.array([1.0, -2.0]), np.array([0.5, 0.5]), np.zeros(2)
    for step in range(9):
        if step % 3 < 2:
            momentum = 0.9 * momentum - (g - c)
            c = np.clip(c - 0.1 * momentum, -0.9, 0.9)
        else:
            g = g - 0.2 * c
    np.testing.assert_allclose(model["g"], g, rtol=1e-12)
    np.testing.assert_allclose(model["c"], c, rtol=1e-12)
    np.testing.assert_array_equal(history["turn"], [0, 0, 1] * 3)
    stream = [jax.random.fold_in(jax.random.split(KEY)[1], step) for step in range(9)]
    drawn = np.array([float(jax.random.normal(key, ())) for key in stream])
    own = history["turn"] == 0
    np.testing.assert_allclose(history["drawn"][own], drawn[own], rtol=1e-12)
    assert np.isnan(history["drawn"][~own]).all() and np.isnan(history["mine"][own]).all()


def test_an_average_of_a_player_is_over_its_own_steps():
    turns = [
        Turn(line, optax.sgd(0.1), lambda m: m["w"], steps=3),
        Turn(lambda m, b, k: m["v"] ** 2, optax.sgd(0.25), lambda m: m["v"]),
    ]
    start = W | {"v": jnp.asarray(1.0)}
    model, _ = nde.fit(start, turns, DATA, steps=8, average=Average(), key=KEY, progress=False)
    np.testing.assert_allclose(model["v"], np.mean([0.5, 0.25]), rtol=1e-12)


@pytest.mark.parametrize("batch_size, parts", [(4, 2), (None, 5), (7, 3)])
def test_a_batch_in_parts_is_the_batch(batch_size, parts):
    def loss(model, batch, key):
        drawn = jax.vmap(jax.random.normal)(batch.keys)
        noise = jnp.sum(jnp.where(batch.mask, drawn, 0.0)) / jnp.sum(batch.mask, dtype=float)
        return line(model, batch, key) + noise * model["w"][0], {"noise": noise}

    options = {"steps": 9, "batch_size": batch_size, "optim": optax.adam(0.1)}
    model, history = fit(W, loss, accumulate=parts, **options)
    expected, reference = fit(W, loss, **options)
    np.testing.assert_allclose(model["w"], expected["w"], rtol=1e-11)
    for name in ("loss", "gradient_norm", "noise"):
        np.testing.assert_allclose(history[name], reference[name], rtol=1e-11)


def test_line_searches_are_optimizers():
    model, history = fit(W, line, optim=optax.lbfgs(), steps=15)
    solution = np.linalg.lstsq(X, Y, rcond=None)[0]
    np.testing.assert_allclose(model["w"], solution, rtol=1e-6)
    assert history["loss"][-1] <= history["loss"][0]


def test_a_projection_after_every_update_is_projected_gradient_descent():
    model, _ = fit(W, line, project=lambda m: {"w": jnp.clip(m["w"], -0.8, 0.3)})
    w = np.zeros(3)
    for _ in range(20):
        w = np.clip(w - 0.1 * gradient(w), -0.8, 0.3)
    np.testing.assert_allclose(model["w"], w, rtol=1e-12)


def test_callbacks_get_plain_numbers_and_all_run_before_one_stops():
    seen, others = [], []
    first = lambda numbers: seen.append(numbers) or numbers["step"] == 24
    model, history = fit(W, told, steps=200, callbacks=[first, lambda n: others.append(n)])
    assert len(history) == 30 == len(seen) == len(others)  # they are told every ten steps
    assert [numbers["step"] for numbers in seen] == list(range(30))
    assert {type(value) for numbers in seen for value in numbers.values()} == {int, float, bool}
    np.testing.assert_array_equal([numbers["loss"] for numbers in seen], history["loss"])
    np.testing.assert_array_equal(model["w"], fit(W, told, steps=30)[0]["w"])


def test_a_log_has_a_line_per_step_and_the_history_is_a_table(tmp_path):
    log = tmp_path / "log.jsonl"
    options = {"steps": 12, "validation": Validation(DATA, every=5)}
    for _ in range(2):  # a new run begins the log anew
        _, history = fit(W, line, callbacks=JSONLines(log), **options)
    lines = [json.loads(row) for row in log.read_text().splitlines()]
    assert [row["step"] for row in lines] == list(range(12))
    np.testing.assert_array_equal([row["loss"] for row in lines], history["loss"])
    assert [row["step"] for row in lines if "validation" in row] == [4, 9, 11]
    history.save_csv(tmp_path / "history.csv")
    with open(tmp_path / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    np.testing.assert_array_equal([float(row["loss"]) for row in rows], history["loss"])
    assert [row["validation"] == "nan" for row in rows].count(False) == 3


def test_some_observation_times_are_left_out_in_training_alone():
    """With a model that is constant, the loss is the mean square of what was left in."""
    ts = jnp.broadcast_to(jnp.arange(40.0), (2, 40))
    ys = jnp.arange(80.0).reshape(2, 40, 1)
    constant = nde.NeuralODE(eqx.Partial(lambda p, t, y, a: 0.0 * p * y, jnp.ones(())))
    loss = functools.partial(nde.losses.trajectory, dropout=0.5)
    batch = nde.train.Batch((ts, ys), keys=jax.random.split(KEY, 2))
    value, metrics = loss(constant, batch, KEY)
    assert 20 < float(metrics["weight"]) < 58
    errors = (ys - ys[:, :1])[:, 1:]
    validated, everything = loss(constant, nde.train.Batch((ts, ys), training=False), KEY)
    np.testing.assert_allclose(validated, np.mean(errors**2), rtol=1e-12)
    assert float(everything["weight"]) == 78 and float(value) != float(validated)


RATE = 1.0


class Offset:
    """A loss that is an object of the user's own."""

    def __init__(self, value):
        self.value = value

    def __call__(self, model, batch, key):
        return RATE * line(model, batch, key) + self.value


def made(offset, array):
    """A function that is made again with every call, as in a notebook."""

    def loss(model, batch, key):
        return RATE * line(model, batch, key) + offset + jnp.sum(array)

    return loss


def test_a_second_fit_compiles_nothing_and_notices_what_changed(monkeypatch):
    """What was compiled is counted; whether it is the right thing, the value tells."""
    count, make = [], program.make_step
    monkeypatch.setattr(program, "make_step", lambda *args: count.append(1) or make(*args))

    def check(loss, new, offset, **options):
        before = len(count)
        _, history = fit(W, loss, **{"optim": optax.adam(0.1), "steps": 2} | options)
        assert len(count) - before == new
        np.testing.assert_allclose(history["loss"][0], RATE * np.mean(Y**2) + offset, rtol=1e-12)

    array = np.zeros(2)
    check(made(0.5, array), 1, 0.5)
    check(made(0.5, np.zeros(2)), 0, 0.5)  # another function, another optimizer, the same to do
    check(made(0.75, array), 1, 0.75)
    array[:] = 1.0
    check(made(0.5, array), 1, 2.5)
    check(functools.partial(made(0.5, array)), 1, 2.5)
    check(Offset(3.0), 1, 3.0)
    changed = Offset(3.0)
    check(changed, 0, 3.0)
    changed.value = 4.0
    check(changed, 1, 4.0)
    monkeypatch.setitem(globals(), "RATE", 2.0)
    check(changed, 1, 4.0)
    check(made(0.5, array), 1, 2.5)
    check(made(0.5, array), 1, 2.5, optim=optax.adam(0.2))
    check(made(0.5, array), 0, 2.5, steps=3, key=jax.random.key(7))
    check(made(0.5, array), 1, 2.5, project=lambda m: m)
