"""`MLPField` against the same network written in NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import mentions

from nde.fields import Batched, DepthVarying, Legendre, MLPField, Pieces


def naive(field, inputs, scale):
    """scale * tanh(W2 softplus(W1 softplus(W0 x + b0) + b1) + b2)."""
    for layer in field.mlp.layers[:-1]:
        inputs = np.logaddexp(0, np.asarray(layer.weight) @ inputs + np.asarray(layer.bias))
    last = field.mlp.layers[-1]
    return scale * np.tanh(np.asarray(last.weight) @ inputs + np.asarray(last.bias))


@pytest.mark.parametrize("scale", [1.0, np.array([0.5, 3.0])])
@pytest.mark.parametrize("time, context", [(False, 0), (True, 0), (False, 3), (True, 3)])
def test_is_the_network_of_the_docstring(time, context, scale):
    field = MLPField(2, 8, 2, time=time, context=context, scale=scale, key=jax.random.key(0))
    t, y, args = jnp.asarray(0.7), jnp.array([0.3, -0.2]), jnp.array([1.0, 2.0, -1.0])
    inputs = np.concatenate([y, *([t[None]] if time else []), *([args] if context else [])])
    expected = naive(field, inputs, scale)
    np.testing.assert_allclose(field(t, y, args if context else None), expected, rtol=1e-13)


def test_last_layer_scale_zero_is_a_zero_field_that_learns():
    field = MLPField(2, 8, 1, last_layer_scale=0.0, key=jax.random.key(0))
    y = jnp.array([0.3, -0.2])
    np.testing.assert_array_equal(field(0.0, y), 0)
    gradient = eqx.filter_grad(lambda f: f(0.0, y).sum())(field).mlp.layers[-1].weight
    hidden = np.asarray(jax.nn.softplus(field.mlp.layers[0](y)))
    np.testing.assert_allclose(gradient, np.stack([hidden, hidden]), rtol=1e-12)


def test_the_initial_weights_scale_with_last_layer_scale_alone():
    one, tenth = (MLPField(2, 8, 2, last_layer_scale=s, key=jax.random.key(0)) for s in (1.0, 0.1))
    for a, b in zip(one.mlp.layers[:-1], tenth.mlp.layers[:-1], strict=True):
        np.testing.assert_array_equal(a.weight, b.weight)
    ratio = np.asarray(tenth.mlp.layers[-1].weight) / np.asarray(one.mlp.layers[-1].weight)
    np.testing.assert_allclose(ratio, 0.1, rtol=1e-12)


def test_out_size_makes_a_term_and_final_activation_replaces_tanh():
    field = MLPField(
        2, 8, 1, out_size=1, final_activation=lambda x: x, scale=2.0, key=jax.random.key(1)
    )
    y = jnp.array([0.3, -0.2])
    hidden = np.asarray(jax.nn.softplus(field.mlp.layers[0](y)))
    last = field.mlp.layers[1]
    expected = 2.0 * (np.asarray(last.weight) @ hidden + np.asarray(last.bias))
    np.testing.assert_allclose(field(0.0, y), expected, rtol=1e-12)


@pytest.mark.parametrize(
    "y, args",
    [(np.ones((4, 2)), np.ones(())), (np.ones((4, 2)), np.ones((3, 1))), (np.ones(()), None)],
)
def test_a_batched_field_says_what_it_needs(y, args):
    field = Batched(lambda t, y, args: -y)
    with pytest.raises(ValueError, match="`y0` and `args` .* one entry per example"):
        field(0.0, jnp.asarray(y), args)


def test_parameters_that_vary_with_depth_are_sums_over_a_basis():
    fields = [MLPField(2, 4, 1, key=key) for key in jax.random.split(jax.random.key(0), 4)]
    y, t = jnp.array([0.3, -0.2]), 0.7
    pieces = DepthVarying(fields, Pieces(0.2, 0.5, 0.7))
    for at, field in zip((0.1, 0.2, 0.6, t), fields, strict=True):
        np.testing.assert_allclose(pieces(at, y), field(at, y), rtol=1e-12)
    values = np.polynomial.legendre.legvander([2 * t - 1], 3)[0]
    np.testing.assert_allclose(Legendre(4)(t), values, rtol=1e-12)
    mixed = jax.tree.map(
        lambda *leaves: sum(v * x for v, x in zip(values, leaves, strict=True)),
        *(eqx.filter(field, eqx.is_inexact_array) for field in fields),
    )
    wanted = eqx.combine(mixed, fields[0])(t, y)
    np.testing.assert_allclose(DepthVarying(fields, Legendre(4))(t, y), wanted, rtol=1e-12)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda f: DepthVarying([f, f], Legendre(3)), ["`basis`", "(3,)", "2 `fields`"]),
        (lambda f: DepthVarying([f, f.mlp], Legendre(2)), ["`fields[1]`", "other parameters"]),
        (lambda f: DepthVarying([], Legendre(2)), ["`fields` is empty"]),
        (lambda f: Pieces(0.5, 0.2), ["`ends` is (0.5, 0.2)", "increase"]),
    ],
)
def test_parts_that_do_not_fit_are_told(make, words):
    with pytest.raises(ValueError, match=mentions(words)):
        make(MLPField(2, 4, 1, key=jax.random.key(0)))
