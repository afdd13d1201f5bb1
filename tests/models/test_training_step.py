"""The parts of a training run by themselves: batches, the norm of a gradient, what is kept of a step."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from nde._training.batching import IteratorBatches
from nde._training.history import Reports
from nde._training.packing import pack
from nde._training.step import gradient_norm


def test_an_iterator_may_refill_one_array():
    """The device is kept busy, so that whatever reads the batch late finds the next one in it."""
    busy, start = jax.jit(lambda x: jnp.linalg.matrix_power(x, 64)), jnp.eye(600)
    memory = np.zeros(80 * 8 + 64, np.uint8)
    buffer = memory[-memory.ctypes.data % 64 :][: 80 * 8].view(float)  # aligned: jax need not copy

    def refilled():
        for number in itertools.count():
            buffer[:] = number
            yield (buffer,)

    batches = IteratorBatches(refilled())
    taken = []
    for _ in range(8):
        working = busy(start)
        (array,), _ = batches.payload(0)
        taken.append(array)
        buffer[:] = np.nan
        working.block_until_ready()
    np.testing.assert_array_equal(np.stack(taken), np.arange(8)[:, None] * np.ones(80))


def test_the_norm_of_a_gradient_in_half_precision():
    entries = jnp.full(2, 60_000.0, jnp.float16)
    np.testing.assert_allclose(gradient_norm([entries]), 60_000 * np.sqrt(2), rtol=1e-6)


def test_the_program_of_the_norm_grows_with_the_number_of_arrays_and_no_faster():
    def size(number):
        arrays = [jnp.full(3, float(i)) for i in range(number)]
        return len(jax.jit(gradient_norm).lower(arrays).compile().as_text())

    assert size(40) < 2.5 * size(20)


def test_results_of_examples_are_looked_at_and_not_kept():
    reports = Reports(1, progress=False)
    reports.add([pack({"loss": jnp.array(1.0), "result": jnp.zeros(1000, int)})], {})
    [(_, record)] = reports.fetch()
    assert record["result"].shape == (1000,)
    assert sorted(reports.columns()) == ["loss", "seconds"]
    assert "result" not in reports.records[0]
