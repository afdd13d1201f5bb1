"""What `fit` does when something is not finite, fails or breaks."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from least_squares import DATA, START, fit, squares

from nde.solvers import SolveError
from nde.train import NonFiniteError


@pytest.mark.parametrize("where", ["value", "gradient"])
@pytest.mark.parametrize("bad", [0, 5])
def test_a_step_that_is_not_finite_did_not_happen(where, bad):
    def loss(model, batch, key):
        good = squares(model, batch, key)
        if where == "value":
            return jnp.where(batch.step == bad, jnp.nan, good)
        # The value is finite, its derivative infinity * 0.
        spike = jnp.sqrt(jnp.where(batch.step == bad, 0.0, 1.0) * model["w"][0] ** 2)
        return good + 0.0 * spike

    def without(model, batch, key):
        return squares(model, batch, key) + 0.0 * model["w"][0]

    start = {"w": jnp.ones(3), "scale": jnp.ones(())}
    guarded, history = fit(start, loss, optim=optax.adam(0.1), steps=12)
    expected, _ = fit(start, without, optim=optax.adam(0.1), steps=11)
    np.testing.assert_allclose(guarded["w"], expected["w"], rtol=1e-12)
    np.testing.assert_array_equal(np.flatnonzero(history["skipped"]), [bad])


def test_ten_in_a_row_stop_with_the_last_good_model():
    def loss(model, batch, key):
        return squares(model, batch, key) * jnp.where(batch.step < 7, 1.0, jnp.nan)

    expected, _ = fit(START, steps=7)
    with pytest.raises(
        NonFiniteError, match=r"the value of the loss .* step 16 .*10 steps"
    ) as caught:
        fit(START, loss, steps=500)
    np.testing.assert_allclose(caught.value.model["w"], expected["w"], rtol=1e-12)
    assert np.flatnonzero(caught.value.history["skipped"])[0] == 7


def test_too_many_failed_solves_stop_with_the_model_so_far():
    def loss(model, batch, key):
        return squares(model, batch, key), {"failed": jnp.where(batch.step < 5, 0.0, 0.5)}

    with pytest.raises(SolveError, match=r"50% .* step 5.*`error.model`") as caught:
        fit(START, loss, steps=500)
    history = caught.value.history
    expected, reference = fit(START, steps=len(history))
    np.testing.assert_allclose(caught.value.model["w"], expected["w"], rtol=1e-12)
    np.testing.assert_allclose(history["loss"], reference["loss"], rtol=1e-12)
    np.testing.assert_array_equal(history["failed"], np.where(np.arange(len(history)) < 5, 0, 0.5))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_what_interrupts_the_training_brings_the_model_so_far(kind):
    whole = tuple(map(np.asarray, DATA))

    def batches():
        yield from [whole] * 13
        raise kind

    with pytest.raises(kind) as caught:
        fit(START, data=batches(), steps=500)
    expected, reference = fit(START, steps=13)
    np.testing.assert_allclose(caught.value.model["w"], expected["w"], rtol=1e-12)
    np.testing.assert_allclose(caught.value.history["loss"], reference["loss"], rtol=1e-12)


def test_an_interrupt_while_compiling_brings_the_model():
    def loss(model, batch, key):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        fit(START, loss)
    assert caught.value.model["w"] is not None and len(caught.value.history) == 0


def test_a_loss_that_takes_gaps_may_skip_a_step():
    """Where a loss was finite on a batch with nan, a step that is not is one like any other."""
    data = (DATA[0], DATA[1].at[3].set(np.nan))

    def loss(model, batch, key):
        seen = ~jnp.isnan(batch.data[1])
        full = type(batch)((batch.data[0], jnp.where(seen, batch.data[1], 0.0)), seen, batch.step)
        return squares(model, full, key) * jnp.where(batch.step == 5, jnp.nan, 1.0)

    _, history = fit(START, loss, data)
    np.testing.assert_array_equal(np.flatnonzero(history["skipped"]), [5])


def test_a_step_that_breaks_is_reported_as_it_is():
    def loss(model, batch, key):
        return eqx.error_if(squares(model, batch, key), batch.step == 5, "broken")

    with pytest.raises(RuntimeError, match=r"^broken \(While computing `loss`.\)$") as caught:
        fit(START, loss, steps=500)
    expected, _ = fit(START, steps=5)
    np.testing.assert_allclose(caught.value.model["w"], expected["w"], rtol=1e-12)


@pytest.mark.parametrize("steps", [4, 500])
def test_a_run_without_a_single_step_is_not_a_trained_model(steps):
    with pytest.raises(NonFiniteError, match="No step was ever taken: look at the loss") as caught:
        fit(START, lambda *args: squares(*args) * jnp.nan, steps=steps)
    np.testing.assert_array_equal(caught.value.model["w"], START["w"])


def test_a_model_that_fits_already_may_train():
    exact = {"w": jnp.asarray([1.0, -2.0, 0.5]), "scale": jnp.ones(())}
    model, history = fit(exact, data=(DATA[0], DATA[0] @ exact["w"]))
    assert history.final_loss < 1e-20


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_a_gradient_whose_square_leaves_the_range_of_float32_is_one(size):
    size = jnp.float32(size)
    model, history = fit(
        jnp.ones(3, jnp.float32),
        lambda model, batch, key: size * jnp.sum(model**2) / 2,
        optim=optax.sgd(0.1 / size),
        steps=1,
    )
    np.testing.assert_allclose(history["gradient_norm"], [float(size) * np.sqrt(3.0)], rtol=1e-6)
    np.testing.assert_allclose(model, 0.9, rtol=1e-6)


def test_nine_in_a_row_do_not_stop():
    def loss(model, batch, key):
        bad = (batch.step >= 3) & (batch.step < 12)
        return squares(model, batch, key) * jnp.where(bad, jnp.nan, 1.0)

    guarded, history = fit(START, loss, steps=20)
    expected, _ = fit(START, steps=11)
    np.testing.assert_allclose(guarded["w"], expected["w"], rtol=1e-12)
    assert history["skipped"].sum() == 9
