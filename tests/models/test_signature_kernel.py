"""The signature kernel against Bessel functions, a double loop, and autodiff of the plain sweep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from nde.losses import RBF, signature_gram, signature_kernel

RNG = np.random.default_rng(0)


@functools.partial(jax.jit, static_argnums=1)
def straight(product, order):
    line = jnp.linspace(0.0, 1.0, 9)[:, None]
    return signature_kernel(line, product * line, dyadic_order=order)


def test_straight_lines_are_bessel_functions_and_a_constant_path_is_1():
    known = {1.0: 2.2795853, -1.0: 0.2238908}
    assert known[1.0] == pytest.approx(scipy.special.i0(2), abs=1e-7)
    assert known[-1.0] == pytest.approx(scipy.special.j0(2), abs=1e-7)
    for product, value in known.items():
        errors = [straight(product, order) - value for order in (2, 3, 5)]
        assert abs(errors[2]) < 1e-6
        assert errors[0] / errors[1] == pytest.approx(4, abs=0.3)  # second order
        assert abs(4 * errors[1] - errors[0]) / 3 < 1e-6  # extrapolated
    assert straight(0.0, 2) == 1.0


def naive(x, y, kappa, order):
    """The scheme as it is written, by two loops."""
    R = 2**order
    D = np.array(
        [[kappa(x[i : i + 2], y[j : j + 2]) for j in range(len(y) - 1)] for i in range(len(x) - 1)]
    )
    D = np.repeat(np.repeat(D, R, axis=0), R, axis=1) / R**2
    k = np.ones((D.shape[0] + 1, D.shape[1] + 1))
    for i in range(D.shape[0]):
        for j in range(D.shape[1]):
            d = D[i, j]
            k[i + 1, j + 1] = (k[i + 1, j] + k[i, j + 1]) * (1 + d / 2 + d**2 / 12)
            k[i + 1, j + 1] -= k[i, j] * (1 - d**2 / 12)
    return k[-1, -1]


def inner(x, y):
    return (x[1] - x[0]) @ (y[1] - y[0])


def lifted(x, y):
    kernel = np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / 2)
    return kernel[1, 1] - kernel[1, 0] - kernel[0, 1] + kernel[0, 0]


@pytest.mark.parametrize("static_kernel, cell", [(None, inner), (RBF(1.0), lifted)])
@pytest.mark.parametrize("order", [0, 2])
def test_gram_is_the_double_loop(static_kernel, cell, order):
    x, y = 0.5 * RNG.normal(size=(5, 4, 2)), 0.5 * RNG.normal(size=(3, 6, 2))
    gram = functools.partial(
        signature_gram, static_kernel=static_kernel, dyadic_order=order, block=2
    )
    expected = [[naive(a, b, cell, order) for b in y] for a in x]
    np.testing.assert_allclose(gram(jnp.asarray(x), jnp.asarray(y)), expected, rtol=1e-12)
    np.testing.assert_allclose(
        gram(jnp.asarray(y), jnp.asarray(x)), np.transpose(expected), rtol=1e-12
    )
    expected = [[naive(a, b, cell, order) for b in x] for a in x]
    np.testing.assert_allclose(gram(jnp.asarray(x)), expected, rtol=1e-12)


def plain(x, y, kernel, order):
    """The wavefront of one pair, for autodiff."""
    R = 2**order
    if kernel is None:
        D = (x[1:] - x[:-1]) @ (y[1:] - y[:-1]).T
    else:
        k = kernel(x.T[:, :, None], y.T[:, None, :])
        D = k[1:, 1:] - k[1:, :-1] - k[:-1, 1:] + k[:-1, :-1]
    D = jnp.repeat(jnp.repeat(D, R, axis=0), R, axis=1) / R**2
    M, N = D.shape
    skewed = jnp.pad(D, ((0, 0), (0, M))).ravel()[: M * (M + N - 1)].reshape(M, M + N - 1)

    def step(carry, d):
        new, old = carry
        inner = (new[1:] + new[:-1]) * (1 + d / 2 + d**2 / 12) - old[:-1] * (1 - d**2 / 12)
        return (jnp.concatenate([jnp.ones(1), inner]), new), None

    return jax.lax.scan(step, (jnp.ones(M + 1), jnp.ones(M + 1)), skewed.T)[0][0][-1]


@pytest.mark.parametrize("kernel, order", [(None, 0), (None, 1), (RBF(1.0), 1)])
def test_gradient_is_that_of_the_plain_sweep_in_a_quarter_of_its_memory(kernel, order):
    x, y = (jnp.asarray(0.3 * RNG.normal(size=(8, 17, 2)).cumsum(1)) for _ in range(2))
    weights = jnp.asarray(RNG.normal(size=(2, 8, 8)))

    def weighted(gram):
        return lambda x, y: jnp.sum(weights[0] * gram(x, y)) + jnp.sum(weights[1] * gram(x, x))

    def by_autodiff(x, y):
        one = lambda a, b: plain(a, b, kernel, order)
        return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(x, y)

    def ours(x, y):
        other = None if y is x else y
        return signature_gram(x, other, static_kernel=kernel, dyadic_order=order, block=4)

    runs = [
        jax.jit(jax.value_and_grad(weighted(gram), argnums=(0, 1))).lower(x, y).compile()
        for gram in (ours, by_autodiff)
    ]
    (value, gradient), (expected, by_autodiff) = (run(x, y) for run in runs)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for own, other in zip(gradient, by_autodiff, strict=True):
        np.testing.assert_allclose(own, other, rtol=0, atol=1e-10 * float(jnp.abs(other).max()))
    memory = [run.memory_analysis().temp_size_in_bytes for run in runs]
    assert memory[0] <= memory[1] / 4


def test_a_large_kernel_costs_the_gradient_no_digits():
    x = jnp.linspace(0.0, 1.0, 9)[:, None] * jnp.asarray([[6.5]])
    value, own = jax.value_and_grad(lambda x: signature_kernel(x, x))(x)
    assert value > 1e4
    expected = jax.grad(lambda x: plain(x, x, None, 1))(x)
    largest = float(jnp.abs(expected).max())  # the inner points cancel to a millionth of that
    np.testing.assert_allclose(own, expected, rtol=0, atol=1e-12 * largest)
    single = jax.grad(lambda x: signature_kernel(x, x))(x.astype(jnp.float32))
    np.testing.assert_allclose(single, expected, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: signature_gram(x, x[..., :1]), "`x` has shape .* as many channels"),
        (lambda x: signature_gram(x[0]), "`x` is .* a sample of paths is"),
        (lambda x: signature_gram(x, x[:, :1]), "`y` is .* two times or more"),
        (lambda x: signature_gram(x, dyadic_order=-1), "`dyadic_order` is -1"),
        (lambda x: signature_gram(x, block=0), "`block` is 0"),
        (lambda x: signature_gram(x.astype(int)), "`x` has dtype int64"),
        (lambda x: signature_kernel(x, x), "one path is .* use signature_gram"),
    ],
)
def test_what_is_not_a_sample_of_paths(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros((3, 4, 2)))
