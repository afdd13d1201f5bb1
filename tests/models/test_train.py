"""`fit` against the same training written out."""

import itertools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from least_squares import DATA, KEY, START, X, Y, fit, squares

import nde
from nde.train import multi_start


def gradient_descent(w, batches, rate=0.1):
    """The reference: plain NumPy, without the scale."""
    losses = []
    for rows in batches:
        error = X[rows] @ w - Y[rows]
        losses.append(np.mean(error**2))
        w = w - rate * 2 * X[rows].T @ error / len(rows)
    return w, losses


def test_full_batches_are_gradient_descent():
    model, history = fit(START, frozen=lambda model: model["scale"])
    w, losses = gradient_descent(np.zeros(3), [np.arange(10)] * 20)
    np.testing.assert_allclose(model["w"], w, rtol=1e-12)
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-12)
    assert float(model["scale"]) == 1.0


def digits(number, base, count):
    return [int(number // base**i) % base for i in range(count)]


def test_an_epoch_is_a_new_permutation_and_the_last_batch_is_masked():
    def loss(model, batch, key):
        x, y, number = batch.data
        places = jnp.arange(float(batch.mask.size))
        metrics = {
            "rows": jnp.sum(16.0**places * number),
            "mask": jnp.sum(jnp.where(batch.mask, 2.0**places, 0.0)),
            "index": batch.step,
        }
        return nde.losses.mse(x @ model["w"], y, batch.mask), metrics

    data = (*DATA, jnp.arange(10.0))
    model, history = fit({"w": jnp.zeros(3)}, loss, data, steps=9, batch_size=4)
    rows = [digits(number, 16, 4) for number in history["rows"]]
    masks = [digits(number, 2, 4) for number in history["mask"]]
    assert masks == 3 * [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    np.testing.assert_array_equal(history["index"], np.arange(9))
    valid = [[r for r, m in zip(*pair, strict=True) if m] for pair in zip(rows, masks, strict=True)]
    epochs = [sum(valid[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    w, losses = gradient_descent(np.zeros(3), valid)
    np.testing.assert_allclose(model["w"], w, rtol=1e-12)
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-12)


def test_one_compilation_for_every_batch_step_and_schedule():
    traces = itertools.count()

    def loss(model, batch, key):
        next(traces)
        ts, seen = nde.losses.growing_horizon(jnp.arange(5.0), batch.step / 10)
        return squares(model, batch, key) + jnp.sum(jnp.where(seen, ts, 0.0))

    schedule = optax.cosine_decay_schedule(0.1, 20)
    fit(
        {"w": jnp.zeros(3), "scale": jnp.asarray(1.0)},
        loss,
        optim=optax.adam(schedule),
        batch_size=4,
    )
    assert next(traces) == 1


def test_the_host_waits_for_a_few_steps_only(monkeypatch):
    fetches, get = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetches.append(len(tree)) or get(tree))
    fit(START, steps=100)
    assert fetches == [1, 9, *[10] * 9]


def test_an_iterator_is_the_same_training_and_its_short_batch_is_filled_up():
    batches = [np.arange(4), np.arange(4, 8), np.arange(8, 10)]
    data = itertools.cycle([jax.tree.map(lambda a, r=rows: a[r], DATA) for rows in batches])
    model, history = fit({"w": jnp.zeros(3), "scale": 1.0}, data=data, steps=6)
    w, losses = gradient_descent(np.zeros(3), batches * 2)
    np.testing.assert_allclose(model["w"], w, rtol=1e-12)
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-12)


def test_training_repeats_with_its_key_and_differs_with_another():
    first, again = (fit(START, batch_size=4)[0]["w"] for _ in range(2))
    other = fit(START, batch_size=4, key=jax.random.key(1))[0]["w"]
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_loss_gets_a_new_key_at_every_step():
    def loss(model, batch, key):
        return squares(model, batch, key), {"draw": jax.random.uniform(key)}

    _, history = fit(START, loss)
    assert len(set(history["draw"].tolist())) == 20


def test_multi_start_is_fit_from_every_start_best_first():
    def make(key):
        return {"w": jax.random.normal(key, (3,)), "scale": jnp.ones(())}

    models, histories = multi_start(
        make, squares, DATA, starts=3, optim=optax.sgd(0.05), steps=15, progress=False, key=KEY
    )
    starts = [make(k) for k in jax.random.split(jax.random.split(KEY)[0], 3)]
    alone = [fit(start, optim=optax.sgd(0.05), steps=15) for start in starts]
    alone.sort(key=lambda pair: pair[1].final_loss)
    for model, history, (expected, reference) in zip(models, histories, alone, strict=True):
        np.testing.assert_allclose(model["w"], expected["w"], rtol=1e-12)
        np.testing.assert_allclose(history["loss"], reference["loss"], rtol=1e-12)


def test_a_start_that_diverges_stops_alone():
    def make(key):
        bad = key_number(key) == key_number(jax.random.split(jax.random.split(KEY)[0], 2)[0])
        return {"w": jnp.where(bad, jnp.inf, jnp.zeros(3)), "scale": jnp.ones(())}

    models, histories = multi_start(
        make, squares, DATA, starts=2, optim=optax.sgd(0.1), steps=20, progress=False, key=KEY
    )
    w, _ = gradient_descent_with_scale(np.zeros(3), 1.0)
    np.testing.assert_allclose(models[0]["w"], w, rtol=1e-12)
    assert not histories[0]["skipped"].any()
    assert histories[1]["skipped"].all()


def test_a_start_whose_solves_fail_is_not_the_best():
    first = key_number(jax.random.split(jax.random.split(KEY)[0], 2)[0])

    def make(key):
        return {
            "w": jnp.zeros(3),
            "scale": jnp.ones(()),
            "bad": jnp.asarray(key_number(key) == first),
        }

    def loss(model, batch, key):
        easy = jnp.where(model["bad"], 1e-3, 1.0) * squares(model, batch, key)
        return easy, {"failed": jnp.where(model["bad"], 0.7, 0.0)}

    models, histories = multi_start(
        make, loss, DATA, starts=2, optim=optax.sgd(0.1), steps=20, progress=False, key=KEY
    )
    assert [bool(model["bad"]) for model in models] == [False, True]
    assert histories[1].final_loss == np.inf and histories[1]["loss"][-1] < 1e-2


def test_functions_of_the_starts_may_be_made_again():
    def make(key):
        return nde.HybridODE(lambda t, y, p: -p * y, None, jax.random.uniform(key))

    def loss(model, batch, key):
        return nde.losses.mse(
            batch.data[1] * model.known(0.0, 1.0, model.parameters), batch.data[1]
        )

    models, _ = multi_start(
        make, loss, DATA, starts=2, optim=optax.sgd(0.1), steps=2, progress=False, key=KEY
    )
    assert models[0].parameters != models[1].parameters


def key_number(key):
    return tuple(jax.random.key_data(key).tolist())


def gradient_descent_with_scale(w, scale, rate=0.1, steps=20):
    for _ in range(steps):
        error = scale * X @ w - Y
        gradient = 2 * scale * X.T @ error / 10, 2 * (X @ w) @ error / 10
        w, scale = w - rate * gradient[0], scale - rate * gradient[1]
    return w, scale


def test_integer_arrays_functions_and_numerics_are_kept():
    ode = nde.NeuralODE(nde.fields.MLPField(1, 4, 1, key=KEY))
    model = {"ode": ode, "number": jnp.arange(3), "w": jnp.zeros(3), "scale": 1.0}
    trained, _ = fit(model, steps=2)
    np.testing.assert_array_equal(trained["number"], np.arange(3))
    assert eqx.tree_equal(trained["ode"], ode)
    assert not np.array_equal(trained["w"], model["w"])


@pytest.mark.parametrize("dt0", [np.float64(0.1), jnp.asarray(0.1)])
def test_the_first_step_is_not_trained(dt0):
    ode = nde.NeuralODE(nde.fields.MLPField(1, 4, 1, key=KEY), dt0=dt0)
    model = {"ode": ode, "parameters": {"dt0": dt0}, "w": jnp.zeros(3), "scale": 1.0}
    trained, _ = fit(model, optim=optax.adamw(0.1, weight_decay=1.0), steps=2)
    assert float(trained["ode"].dt0) == 0.1
    assert float(trained["parameters"]["dt0"]) < 0.1


def test_a_measured_input_is_not_trained():
    ts = jnp.arange(4.0)
    inputs = [
        nde.paths.linear(ts, ts[:, None] ** 2),
        diffrax.LinearInterpolation(ts, ts**2),
        diffrax.VirtualBrownianTree(jnp.zeros(()), jnp.ones(()), 0.1, (), key=KEY),
    ]

    def loss(model, batch, key):
        first, second, noise = model["inputs"]
        driven = first.evaluate(0.5)[0] + second.evaluate(0.5) + noise.evaluate(0.5)
        return squares(model, batch, key) * driven

    trained, _ = fit({"w": jnp.ones(3), "scale": 1.0, "inputs": inputs}, loss, steps=2)
    assert eqx.tree_equal(trained["inputs"], inputs)


def test_steps_of_several_batches():
    model, _ = fit(START, optim=optax.MultiSteps(optax.sgd(0.1), 3), steps=9)
    expected, _ = fit(START, steps=3)
    np.testing.assert_allclose(model["w"], expected["w"], rtol=1e-7)  # optax counts in float32


@pytest.mark.parametrize("integer", [np.int64, jnp.int32])
def test_numbers_of_steps_and_examples_may_be_integers_of_numpy_and_jax(integer):
    model, history = fit(START, steps=integer(3), batch_size=integer(4), max_skips=integer(2))
    expected, _ = fit(START, steps=3, batch_size=4)
    np.testing.assert_array_equal(model["w"], expected["w"])
    assert len(history) == 3


def test_data_that_grow_are_data():
    """Rounded to single precision, neighbours are equal; that matters for times alone."""
    growth = 1 - np.exp(-np.linspace(0.0, 40.0, 30).reshape(10, 3))

    def loss(model, batch, key):
        return jnp.mean((model["w"][None] - batch.data) ** 2)

    with jax.enable_x64(False):
        _, history = fit({"w": jnp.zeros(3)}, loss, growth, optim=optax.sgd(jnp.float32(0.1)))
    assert history["loss"][-1] < history["loss"][0]


def test_weakly_typed_leaves_keep_their_type():
    trained, _ = fit({"w": jnp.zeros(3), "scale": jnp.asarray(1.0)}, steps=3)
    assert trained["scale"].dtype == jnp.float64
    assert not trained["scale"].weak_type


def test_summary_and_columns_tell_the_run():
    _, history = fit(START, steps=12)
    assert len(history) == 12
    assert np.all(np.diff(history["seconds"]) >= 0)
    gradient = 2 * X.T @ (-Y) / 10
    assert history["gradient_norm"][0] == pytest.approx(np.linalg.norm(gradient))
    text = history.summary()
    assert "12 steps" in text and f"{history['loss'][-1]:.4g}" in text
    assert str(history) == repr(history) == text
    with pytest.raises(KeyError, match="`nfe` is not in the history"):
        history["nfe"]


def test_no_steps_change_nothing():
    model, history = fit(START, steps=0)
    assert model["w"] is START["w"] or np.array_equal(model["w"], START["w"])
    assert len(history) == 0 and history.summary().startswith("0 steps")


@pytest.mark.parametrize("installed", [True, False])
def test_progress_goes_to_the_error_stream(installed, monkeypatch, capsys):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: find(name) if installed or name != "tqdm" else None,
    )
    _, history = fit(START, steps=30, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "30/30" in err and f"{history['loss'][-1]:.4g}" in err


def test_the_keys_of_the_examples_are_those_of_the_batch():
    """A batch that is divided keeps the keys that its examples have in the whole."""
    key, data = jax.random.key(3), jnp.zeros((4, 2))
    whole = nde.train.Batch(data).example_keys(key)
    assert jnp.array_equal(whole, jax.random.split(key, 4))
    part = nde.train.Batch(data[2:], keys=whole[2:])
    assert jnp.array_equal(part.example_keys(key), whole[2:])
