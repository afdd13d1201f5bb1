"""Sparse regression: known fields, and their constants through the solve."""

import jax.numpy as jnp
import numpy as np
import pytest
from messages import mentions

import nde
from nde.symbolic import polynomials, refine, sparse

NAMES = ("x", "y")


def test_polynomials_are_all_monomials():
    assert polynomials(NAMES, 2) == ("x", "y", "x * x", "x * y", "y * y")
    assert len(polynomials(NAMES, 3)) == 9


def test_the_terms_of_a_field_and_the_constants_of_a_solve():
    """Lotka and Volterra's missing terms, from slopes with noise; the solve repairs the constants."""
    rng = np.random.default_rng(0)
    states = rng.uniform(0.2, 3.0, size=(200, 2))
    product = states.prod(axis=1)
    targets = np.stack([-0.9 * product, 0.8 * product], axis=1)
    noisy = targets + 0.05 * rng.normal(size=targets.shape)
    library = ("1.0", *polynomials(NAMES, 3), "sin(x)")
    fronts = sparse(states, noisy, variables=NAMES, library=library)
    shortest = [front.expressions[0] for front in fronts]
    for expression, value in zip(shortest, [-0.9, 0.8], strict=True):
        assert expression.tokens == ("#", "x", "y", "*", "*")
        assert abs(expression.constants[0] - value) < 0.02
    known = lambda t, y, p: jnp.stack([1.3 * y[0], -1.8 * y[1]])
    make = lambda field: nde.HybridODE(known, field, None)
    ts, y0 = jnp.linspace(0.0, 3.0, 16), jnp.array([0.44, 4.6])
    truth = make(nde.symbolic.Field.parse(["-0.9 * x * y", "0.8 * x * y"], NAMES))
    found = refine(fronts, make, ts, y0[None], truth(ts, y0)[None], candidates=3)
    chosen = found.choose(noise=1e-6).expressions
    assert [e.tokens for e in chosen] == [e.tokens for e in shortest]
    constants = [float(e.constants[0]) for e in chosen]
    np.testing.assert_allclose(constants, [-0.9, 0.8], rtol=1e-3)


def test_the_best_support_of_every_size_is_found():
    """v and v^3 together stand for v |v|, with noise; dropping terms one by one would keep them."""
    v = np.linspace(-2, 2, 60)[:, None]
    target = -0.3 * v * np.abs(v) + 0.02 * np.random.default_rng(0).normal(size=v.shape)
    (front,) = sparse(v, target, variables=("v",), library=("v", "v * abs(v)", "cube(v)"))
    assert front.expressions[0].tokens == ("#", "v", "v", "abs", "*", "*")


def test_every_size_is_tried_and_constants_are_read():
    """A constant and two terms, exactly; the front falls to rounding where it is complete."""
    x = np.linspace(0.1, 2.0, 40)[:, None]
    target = 0.5 - 1.5 * x + 0.25 * np.sin(x)
    (front,) = sparse(x, target, variables=("x",), library=("1.0", "x", "x * x", "sin(x)"))
    assert front.losses[-1] < 1e-20
    np.testing.assert_allclose(front.expressions[-1](jnp.asarray(x)), target, rtol=1e-9)


def test_what_a_network_has_learned_is_distilled_by_either_way():
    field = lambda t, y, args: jnp.stack([y[1], -2.0 * y[0]])
    states = np.random.default_rng(1).normal(size=(50, 2))
    fronts = nde.symbolic.distill(
        field, states, by=sparse, variables=NAMES, library=polynomials(NAMES, 2)
    )
    for front, name, value in zip(fronts, ("y", "x"), (1.0, -2.0), strict=True):
        assert front.choose().tokens == ("#", name, "*")
        np.testing.assert_allclose(front.choose().constants, [value], rtol=1e-12)


X = np.random.default_rng(0).normal(size=(30, 2))
BAD = [
    ((), ["`library` is empty"]),
    (("x", "log(x)"), ["`library` has ['log(x)']", "not finite"]),
    (("x", "y", "x + y"), ["`library` has 3 terms, of which only 2 are independent"]),
    (("x", "z"), ["'z'"]),
]


@pytest.mark.parametrize("library, words", BAD)
def test_bad_input(library, words):
    with pytest.raises(ValueError, match=mentions(words)):
        sparse(X, X[:, :1], variables=NAMES, library=library)


def test_terms_that_are_nearly_the_same_are_named():
    x = 0.05 * X[:, :1]
    with pytest.warns(UserWarning, match=mentions(["'x'", "'sin(x)'", "proportional"])):
        sparse(x, x**2 + x, variables=("x",), library=("x", "sin(x)", "x * x"))
