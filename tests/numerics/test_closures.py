"""Closed functions against the functions themselves, and which arrays the pool takes in."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from oracles import relative

from nde.solvers.lanes.closures import Pool

W, B, UNUSED = jnp.array([[0.3, -0.2], [0.5, 0.1]]), jnp.array([0.1, 0.7]), jnp.ones(1000)
X = {"x": jnp.array([0.4, -0.9]), "t": jnp.array(0.3)}


def layer(x, args):
    return {"y": jnp.tanh(args["w"] @ x["x"]) * x["t"], "b": args["b"]}


ARGS = {"w": W, "b": B, "unused": UNUSED, "name": "text", "count": 3}


def test_the_pool_takes_what_is_used_and_each_once():
    pool = Pool()
    first = pool.convert(lambda x: layer(x, ARGS), X)
    second = pool.convert(lambda x: W @ x["x"] + B + W[0], X)
    third = pool.convert(lambda x: x["t"] + 1.0, X)
    assert len(pool.consts) == 2 and {id(c) for c in pool.consts} == {id(W), id(B)}
    assert set(first.uses) == set(second.uses) == {0, 1} and third.uses == ()
    assert relative(first(pool.consts, X), layer(X, ARGS)) == 0
    assert relative(second(pool.consts, X), W @ X["x"] + B + W[0]) < 1e-15
    assert third([], X) == X["t"] + 1.0


def test_other_constants_give_another_function():
    """The arrays are operands, not part of the computation."""
    pool = Pool()
    closed = pool.convert(lambda x: layer(x, ARGS), X)
    other = [2.0 * c for c in pool.consts]
    assert relative(closed(other, X), layer(X, {"w": 2.0 * W, "b": 2.0 * B})) < 1e-15
    assert relative(closed(other, X), closed(pool.consts, X)) > 0.1


def test_traced_values_are_taken_in_where_they_come_from():
    """Inside a gradient, a batch and a compilation the constants are tracers."""

    def through_the_pool(w, x):
        pool = Pool()
        closed = pool.convert(lambda x: jnp.sin(w @ x) + w[0], x)
        return jnp.sum(closed(pool.consts, x) ** 2)

    direct = lambda w, x: jnp.sum((jnp.sin(w @ x) + w[0]) ** 2)
    batch = jnp.stack([W, 2.0 * W, -W])
    for fn in (jax.grad, lambda f: jax.jit(jax.vmap(jax.grad(f), in_axes=(0, None)))):
        w = W if fn is jax.grad else batch
        assert relative(fn(through_the_pool)(w, X["x"]), fn(direct)(w, X["x"])) < 1e-15


def test_a_module_with_its_own_derivative():
    """Parameters deep in a tree, a compiled function inside, and a custom derivative survive."""

    @jax.custom_jvp
    def clipped(x):
        return jnp.clip(x, -0.5, 0.5)

    clipped.defjvp(lambda x, tangent: (clipped(x[0]), 3.0 * tangent[0]))
    network = eqx.nn.MLP(2, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(0))
    field = lambda x: clipped(eqx.filter_jit(network)(x))
    pool = Pool()
    closed = pool.convert(field, X["x"])
    parameters = jax.tree.leaves(eqx.filter(network, eqx.is_array))
    assert len(pool.consts) == len(parameters) == 4
    pull = lambda f: jax.vjp(f, X["x"])[1](jnp.ones(2))
    assert relative(pull(lambda x: closed(pool.consts, x)), pull(field)) < 1e-15


def test_integers_keys_and_plain_numbers():
    key, counts = jax.random.key(5), np.arange(2)
    pool = Pool()

    def field(x):
        noise = jax.random.normal(key, (2,))
        return x["x"] + noise * counts.astype(float), 1.0, 2

    closed = pool.convert(field, X)
    got, want = closed(pool.consts, X), field(X)
    np.testing.assert_array_equal(got[0], want[0])
    assert got[1] == 1.0 and got[2] == 2 and all(isinstance(x, jax.Array) for x in got)
    moved = [jax.random.key(6) if c is key else c for c in pool.consts]
    assert not np.array_equal(closed(moved, X)[0], want[0])


def test_constants_of_the_pool_stay_alive():
    """The pool tells arrays apart by identity, so it must hold on to them."""
    pool = Pool()
    closed = [
        pool.convert(lambda x, i=i: x["x"] + jnp.full(2, float(i)) * W[0], X) for i in range(20)
    ]
    for i, fn in enumerate(closed):
        assert relative(fn(pool.consts, X), X["x"] + i * W[0]) < 1e-15
