"""Log-signatures beside iterated sums, the shuffle identity and the matrix logarithm."""

import itertools

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from nde import paths

RANDOM = np.random.default_rng(1)
TIMES = np.cumsum(RANDOM.uniform(0.1, 0.3, 11))
VALUES = RANDOM.normal(size=(11, 3))


@eqx.filter_jit
def log_signature(ys, window, depth):
    path = paths.linear(jnp.asarray(TIMES), ys, time=False)
    return paths.log_signature(path, window, depth)


def naive_signature(steps, depth):
    """Every word by the sum over weakly increasing positions, repeated ones with 1 / m!."""
    channels = steps.shape[1]
    words = [w for m in range(depth + 1) for w in itertools.product(range(channels), repeat=m)]
    total = {w: float(len(w) == 0) for w in words}
    for d in steps:
        exponential = {w: np.prod([d[i] / k for k, i in enumerate(w, 1)]) for w in words}
        total = {
            w: sum(total[w[:k]] * exponential[w[k:]] for k in range(len(w) + 1)) for w in words
        }
    return total


def product(a, b, depth):
    out = {}
    for (u, x), (v, y) in itertools.product(a.items(), b.items()):
        if len(u) + len(v) <= depth:
            out[u + v] = out.get(u + v, 0.0) + x * y
    return out


def bracket(word):
    """P_w, from the definition: the right factor is the longest proper Lyndon suffix."""
    if len(word) == 1:
        return {word: 1.0}
    lyndon = set(paths.lyndon_words(max(word) + 1, len(word)))
    cut = next(k for k in range(1, len(word)) if word[k:] in lyndon)
    u, v = bracket(word[:cut]), bracket(word[cut:])
    back = product(v, u, 99)
    return {w: x - back.get(w, 0.0) for w, x in product(u, v, 99).items()} | {
        w: -x for w, x in back.items() if w not in product(u, v, 99)
    }


def exponential(coordinates, channels, depth):
    """exp of the sum of coordinate times bracket, in the tensor algebra."""
    log = {}
    for word, a in zip(paths.lyndon_words(channels, depth), coordinates, strict=True):
        for w, x in bracket(word).items():
            log[w] = log.get(w, 0.0) + a * x
    total, power = {(): 1.0}, {(): 1.0}
    for k in range(1, depth + 1):
        power = {w: x / k for w, x in product(power, log, depth).items()}
        for w, x in power.items():
            total[w] = total.get(w, 0.0) + x
    return total


def shuffles(u, v):
    if not u or not v:
        return [u + v]
    return [u[:1] + w for w in shuffles(u[1:], v)] + [v[:1] + w for w in shuffles(u, v[1:])]


@pytest.mark.parametrize("channels, depth", [(3, 4), (2, 5), (1, 3)])
def test_the_exponential_is_the_signature(channels, depth):
    ys = VALUES[:, :channels]
    found = log_signature(jnp.asarray(ys), 10, depth).increments[0]
    signature = exponential(np.asarray(found), channels, depth)
    for word, value in naive_signature(np.diff(ys, axis=0), depth).items():
        np.testing.assert_allclose(signature.get(word, 0.0), value, atol=1e-10)


def test_the_shuffle_identity_and_its_negative_control():
    coordinates = np.asarray(log_signature(jnp.asarray(VALUES), 10, 4).increments[0])

    def violation(signature):
        words = [w for m in (1, 2) for w in itertools.product(range(3), repeat=m)]
        return max(
            abs(signature[u] * signature[v] - sum(signature[w] for w in shuffles(u, v)))
            for u, v in itertools.product(words, words)
        )

    signature = exponential(coordinates, 3, 4)
    assert violation(signature) < 1e-10
    assert violation(signature | {(0, 1): signature[0, 1] + 1e-3}) > 1e-4


def test_depth_two_is_the_increment_and_the_area_of_every_window():
    control = log_signature(jnp.asarray(VALUES), 4, 2)
    assert paths.lyndon_words(3, 2) == ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2))
    for k, (begin, end) in enumerate([(0, 4), (4, 8), (8, 10)]):
        ys = VALUES[begin : end + 1]
        steps, since = np.diff(ys, axis=0), ys[:-1] - ys[0]
        area = 0.5 * (since.T @ steps - steps.T @ since)
        expected = np.append(ys[-1] - ys[0], area[[0, 0, 1], [1, 2, 2]])
        np.testing.assert_allclose(control.increments[k], expected, atol=1e-13)
        np.testing.assert_allclose(
            control.evaluate(*jnp.asarray(TIMES)[jnp.array([begin, end])]), expected, atol=1e-12
        )
        inside = jnp.asarray(0.5 * (TIMES[begin] + TIMES[end]))
        slope = expected / (TIMES[end] - TIMES[begin])
        np.testing.assert_allclose(control.derivative(inside), slope, atol=1e-12)
    np.testing.assert_array_equal(control.ts, TIMES[[0, 4, 8, 10]])
    np.testing.assert_array_equal(control.start, VALUES[0])


@pytest.mark.parametrize(
    "channels, depth, count", [(3, 1, 3), (3, 2, 6), (3, 3, 14), (3, 4, 32), (5, 4, 205), (1, 4, 1)]
)
def test_the_number_of_lyndon_words(channels, depth, count):
    """Witt's formula, cumulated."""
    assert len(paths.lyndon_words(channels, depth)) == count


@pytest.mark.parametrize("window", [1, 4])
def test_padding_of_a_series_changes_no_log_signature(window):
    ts = jnp.asarray(np.append(TIMES, [np.nan] * 3))
    ys = jnp.asarray(np.append(VALUES, np.full((3, 3), np.nan), axis=0))

    @eqx.filter_jit
    def of(ts, ys, length=None):
        return paths.log_signature(paths.linear(ts, ys, length), window, 3)

    plain = of(jnp.asarray(TIMES), jnp.asarray(VALUES))
    found, windows = of(ts, ys, jnp.asarray(11)), plain.increments.shape[0]
    np.testing.assert_allclose(found.increments[:windows], plain.increments, atol=1e-13)
    np.testing.assert_array_equal(found.increments[windows:], 0.0)
    assert found.t1 == plain.t1


def test_what_has_no_log_signature_here():
    ts, ys = jnp.asarray(TIMES), jnp.asarray(VALUES)
    with pytest.raises(ValueError, match="not made of straight pieces"):
        paths.log_signature(paths.hermite_cubic(ts, ys), 2, 2)
    for options in ({"window": 0, "depth": 2}, {"window": 2, "depth": 1.5}):
        with pytest.raises(ValueError, match="must be an integer >= 1"):
            paths.log_signature(paths.linear(ts, ys), **options)
