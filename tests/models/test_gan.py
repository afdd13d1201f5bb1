"""The critic of paths: Lipschitz by its weights, blind to padding, and two losses that oppose."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nde
from nde import gan

KEY = jax.random.key(0)
TS = jnp.linspace(0.0, 1.0, 6)


class Walk(eqx.Module):
    """A generator of random walks with a drift to learn."""

    drift: jax.Array

    def __call__(self, ts, *, key):
        steps = jax.random.normal(key, (ts.shape[0] - 1, 1)) * jnp.sqrt(jnp.diff(ts))[:, None]
        walk = jnp.concatenate([jnp.zeros((1, 1)), jnp.cumsum(steps, axis=0)])
        return walk + self.drift * ts[:, None]


def pair():
    return {"generator": Walk(jnp.array(0.0)), "critic": gan.PathCritic(1, 4, 4, 1, key=KEY)}


def batch(drift, examples=64):
    keys = jax.random.split(jax.random.key(5), examples)
    ys = jax.vmap(lambda key: Walk(jnp.array(drift))(TS, key=key))(keys)
    mask = jnp.arange(examples) < examples - 1
    return nde.train.Batch((jnp.tile(TS, (examples, 1)), ys), mask, jnp.array(0))


def test_clipping_bounds_weights_and_leaves_biases():
    critic = jax.tree.map(lambda x: 9 * x if eqx.is_inexact_array(x) else x, pair()["critic"])
    model = gan.project({"generator": None, "critic": critic})
    is_linear = lambda x: isinstance(x, eqx.nn.Linear)
    layers = [
        [x for x in jax.tree.leaves(tree, is_leaf=is_linear) if is_linear(x)]
        for tree in (critic, model["critic"])
    ]
    assert len(layers[0]) == 5
    for before, after in zip(*layers, strict=True):
        bound = 1 / before.out_features
        np.testing.assert_array_equal(after.weight, np.clip(before.weight, -bound, bound))
        np.testing.assert_array_equal(after.bias, before.bias)
        assert np.abs(np.asarray(after.weight)).sum(axis=0).max() <= 1 + 1e-12  # its 1-norm
    slopes = jax.vmap(jax.grad(gan.lipswish))(jnp.linspace(-5, 5, 1001))
    assert 0.99 < jnp.max(jnp.abs(slopes)) <= 1


def test_padding_does_not_change_a_score():
    critic, ys = pair()["critic"], jnp.sin(TS)[:, None]
    padded = jnp.append(TS, TS[-1]), jnp.concatenate([ys, ys[-1:]])
    np.testing.assert_allclose(critic(*padded), critic(TS, ys), rtol=1e-12)


@pytest.mark.slow
def test_the_two_losses_oppose_and_find_a_drift():
    """The critic alone learns to tell the paths apart; then the generator moves towards the data."""
    model, data = pair(), batch(2.0)

    @eqx.filter_jit
    def gradients(model, key):
        critic = lambda c: gan.critic_loss(model | {"critic": c}, data, key)
        generator = lambda g: gan.generator_loss(model | {"generator": g}, data, key)
        up = eqx.filter_value_and_grad(critic, has_aux=True)(model["critic"])
        down = eqx.filter_value_and_grad(generator, has_aux=True)(model["generator"])
        return up, down

    move = lambda tree, grad, rate: eqx.apply_updates(
        tree, jax.tree.map(lambda g: -rate * g, eqx.filter(grad, eqx.is_inexact_array))
    )
    gaps = []
    for i in range(40):
        ((loss, metrics), grad), ((_, again), towards) = gradients(
            model, jax.random.fold_in(KEY, i)
        )
        np.testing.assert_allclose(loss, -metrics["gap"], rtol=1e-12)
        np.testing.assert_allclose(again["gap"], metrics["gap"], rtol=1e-12)
        gaps.append(float(metrics["gap"]))
        model = gan.project(model | {"critic": move(model["critic"], grad, 0.05)})
    assert gaps[-1] > gaps[0] + 0.02
    assert towards.drift < 0  # descending, the drift grows towards that of the data
