"""Bad input to `multi_start`: every message says what differs and where it belongs."""

import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
from messages import mentions

import nde
from nde.hybrid import Bounded
from nde.train import multi_start

KEY = jax.random.key(0)
BATCH = (jnp.ones((4, 3)), jnp.zeros(4))


def loss(model, batch, key):
    x, y = batch.data
    return jnp.mean((x @ model["w"] - y) ** 2)


def from_starts(make, starts=2):
    return multi_start(make, loss, BATCH, starts=starts, optim=optax.sgd(0.1), steps=1, key=KEY)


def numbered():
    """A function that gives 0, 1, ...: something to be different in every start."""
    numbers = itertools.count()
    return lambda: next(numbers)


def holds(number):
    return lambda x: number * x


STARTS = [
    (
        lambda n: {"w": jnp.ones(3), "dt0": 0.1 * n},
        ["`model['dt0']`", "0.0 and 0.1", "jnp.asarray"],
    ),
    (lambda n: {"w": jnp.ones(3 + n)}, ["`model['w']`", "f64[3] and f64[4]"]),
    (lambda n: {"w": jnp.ones(3), "f": holds(n)}, ["`model['f']`", "outside `make_model`"]),
    (lambda n: {"w": jnp.ones(3), "f": lambda x, n=n: n * x}, ["`model['f']`", "outside"]),
    (lambda n: {"w": jnp.ones(3), "layers": n * [jnp.ones(1)]}, ["structure", "['layers']"]),
    (lambda n: {"w": jnp.ones(3), "p": Bounded(0.1, 0.0, 1.0 + n)}, ["structure", "Bounded"]),
]


@pytest.mark.parametrize("make, fragments", STARTS)
def test_starts_that_differ_beside_the_values_of_arrays(make, fragments):
    number = numbered()
    with pytest.raises(ValueError, match=mentions(["starts 0 and 1", *fragments])):
        from_starts(lambda key: make(number()))


@pytest.mark.parametrize("starts", [0, True, 1.0])
def test_multi_start_says_what_is_wrong(starts):
    with pytest.raises(ValueError, match=f"`starts` is {starts}"):
        from_starts(lambda key: {"w": jnp.ones(3)}, starts)


def test_multi_start_makes_its_models():
    with pytest.raises(ValueError, match="`make_model` has signature"):
        from_starts(nde.NeuralODE(lambda t, y, args: -y))
