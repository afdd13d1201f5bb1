"""nan at any place and any step: the parameters stay finite, and are those of the run that left the step
out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from least_squares import DATA, fit, squares

from nde.train import Average, Validation

START = {"w": jnp.ones(3), "scale": jnp.ones(()), "bad": jnp.asarray(-1)}


def spoiled(kind):
    """A loss that is spoiled at the step `model["bad"]`, in one of three ways."""

    def loss(model, batch, key):
        now = batch.step == model["bad"]
        if kind == "data":  # one value of one example
            x, y = batch.data
            batch = type(batch)((x, y.at[2].set(jnp.where(now, jnp.nan, y[2]))), batch.mask)
        good = squares(model, batch, key)
        if kind == "value":
            return jnp.where(now, jnp.inf, good)
        # The value is finite, its derivative infinity * 0.
        spike = jnp.where(now & (kind == "gradient"), 0.0, 1.0) * model["w"][0] ** 2
        return good + 0.0 * jnp.sqrt(spike)

    return loss


@pytest.fixture(scope="module")
def expected():
    return fit(START, spoiled("nothing"), optim=optax.adam(0.1), steps=11)[0]


@pytest.mark.parametrize("kind", ["data", "value", "gradient"])
def test_a_spoiled_step_is_left_out_wherever_it_is(kind, expected):
    for bad in range(10):
        model, history = fit(
            START | {"bad": jnp.asarray(bad)}, spoiled(kind), optim=optax.adam(0.1), steps=12
        )
        np.testing.assert_allclose(model["w"], expected["w"], rtol=1e-12)
        np.testing.assert_array_equal(np.flatnonzero(history["skipped"]), [bad])


def hostile(inner, where):
    """An optimizer whose update, or whose state, is nan at the fifth step of its own."""

    def update(grads, state, params=None):
        updates, (count, moments) = grads, state
        updates, new = inner.update(grads, moments, params)
        spoil = lambda x: jnp.where(count == 5, jnp.nan * x, x)
        if where == "update":
            updates = jax.tree.map(spoil, updates)
        return updates, (count + 1, new)

    return optax.GradientTransformation(lambda p: (jnp.zeros((), int), inner.init(p)), update)


def test_an_update_that_is_nan_is_tried_again_and_stops():
    """The state of the optimizer is that before the step, so the same happens at every step."""
    with pytest.raises(FloatingPointError, match="the update of `model..scale..") as caught:
        fit(START, squares, optim=hostile(optax.sgd(0.1), "update"), steps=500)
    reference, _ = fit(START, squares, optim=optax.sgd(0.1), steps=5)
    np.testing.assert_allclose(caught.value.model["w"], reference["w"], rtol=1e-12)


def test_one_batch_of_an_iterator():
    def batches(bad):
        for step in range(12):
            y = np.array(DATA[1])
            y[3] = np.nan if step == bad else y[3]
            yield np.asarray(DATA[0]), y

    with pytest.raises(FloatingPointError, match=r"`data\[1\]` of batch 4 is nan in 1 of 10"):
        fit(START, squares, batches(4), steps=12)


def test_average_and_best_never_hold_nan():
    model, history = fit(
        START | {"bad": jnp.asarray(3)},
        spoiled("gradient"),
        steps=6,
        average=Average(decay=0.5),
        validation=Validation(DATA, every=2, loss=lambda *args: squares(*args) * jnp.nan),
    )
    assert np.isfinite(model["w"]).all() and np.isnan(history["validation"]).all()
