"""Series of unequal length in buckets: every series is seen once an epoch, and padding counts nowhere."""

import jax
import numpy as np
import optax
import pytest

import nde
from nde._training.ragged import RaggedBatches
from nde.train import Ragged

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
LENGTHS = [3, 9, 4, 9, 7, 3, 5, 8, 4, 6, 9]
SERIES = [
    (np.sort(RNG.uniform(0, 1, n)), np.concatenate([[[1.0]], RNG.normal(size=(n - 1, 1))]))
    for n in LENGTHS
]


def test_buckets_are_of_about_equal_number_and_as_long_as_they_must():
    assert Ragged(SERIES, 3).shapes == {4: 4, 8: 4, 9: 3}
    assert Ragged(SERIES, 100).shapes == {3: 2, 4: 2, 5: 1, 6: 1, 7: 1, 8: 1, 9: 3}
    assert Ragged(SERIES, 1).shapes == {9: 11}


def test_an_epoch_sees_every_series_once_in_an_order_of_its_own():
    batches = RaggedBatches(Ragged(SERIES, 3), 3, KEY)
    orders = []
    for epoch in range(2):
        seen = [batches.examples(step) for step in range(5 * epoch, 5 * epoch + 5)]
        assert sorted(sum(seen, [])) == list(range(len(SERIES)))
        orders.append(seen)
        for step, numbers in enumerate(seen, start=5 * epoch):
            (ts, ys), mask = batches.rows(step)(batches.payload(step), 0, 1)
            assert int(mask.sum()) == len(numbers) and ts.shape == mask.shape + ts.shape[1:]
            for row, number in enumerate(numbers):
                length = LENGTHS[number]
                np.testing.assert_array_equal(ts[row, :length], SERIES[number][0])
                np.testing.assert_array_equal(ts[row, length:], SERIES[number][0][-1])
                np.testing.assert_array_equal(ys[row, :length], SERIES[number][1])
    assert orders[0] != orders[1]


def decay():
    return nde.HybridODE(lambda t, y, p: -p * y, None, 0.5)


def test_training_on_buckets_is_training_on_each_series():
    """One epoch of gradient descent, with the gradient of every batch from its series one by one."""
    data = Ragged(SERIES, 3)
    model, history = nde.fit(
        decay(), nde.losses.trajectory, data, optim=optax.sgd(0.1), steps=10, batch_size=3,
        key=KEY, progress=False,
    )  # fmt: skip
    order = RaggedBatches(data, 3, jax.random.split(KEY)[0])
    rate, losses = 0.5, []
    for step in range(10):
        series = [SERIES[number] for number in order.examples(step)]
        count = sum(len(ts) - 1 for ts, _ in series)
        model_of = lambda ts, r: np.exp(-r * (ts - ts[0]))[1:, None]
        gaps = [(model_of(ts, rate) - ys[1:], ts) for ts, ys in series]
        losses.append(sum((gap**2).sum() for gap, _ in gaps) / count)
        slope = sum(
            (2 * gap * -(ts - ts[0])[1:, None] * model_of(ts, rate)).sum() for gap, ts in gaps
        )
        rate -= 0.1 * slope / count
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-2)
    np.testing.assert_allclose(model.parameters, rate, rtol=1e-3)


@pytest.mark.parametrize(
    "series, words",
    [
        ([], "one or more"),
        (3, "one or more"),
        ([(np.ones(3), np.ones(4))], "`series.0.` has arrays of lengths"),
        ([(np.ones(3),), (np.ones((3, 2)),)], "`series.1.` has arrays"),
        ([(np.ones(0),)], "1 or more"),
    ],
)
def test_series_that_do_not_fit(series, words):
    with pytest.raises(ValueError, match=words):
        Ragged(series)
