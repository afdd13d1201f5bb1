"""Tapes against text and sympy, constants against differences, small searches with known answers."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sympy
from messages import mentions

import nde
from nde import symbolic
from nde.symbolic.constants import fit_constants
from nde.symbolic.evolution import Settings, advance, start
from nde.symbolic.expression import from_tape, to_tape
from nde.symbolic.front import make_front
from nde.symbolic.tape import CONSTANT, PAD, Language, complexity, evaluate, evaluate_with_jacobian
from nde.symbolic.units import agree
from nde.symbolic.variation import DRAWS, Tape, random_tape, vary

KEY = jax.random.key(0)
LANGUAGE = Language(("x", "v"), tuple(symbolic.OPERATORS), 16)
INPUTS = jax.random.uniform(KEY, (2, 12), minval=-2.0, maxval=2.0)


@pytest.fixture(scope="module")
def tapes():
    """Random expressions after four rounds of change."""
    draws = jax.random.uniform(jax.random.fold_in(KEY, 1), (5, 300, DRAWS))
    tapes = jax.vmap(lambda draws: random_tape(LANGUAGE, draws, np.dtype(float)))(draws[0])
    change = jax.jit(jax.vmap(lambda *x: vary(LANGUAGE, *x)))
    for row in draws[1:]:
        tapes = change(tapes, jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), tapes), row)
    return tapes


@pytest.fixture(scope="module")
def values(tapes):
    run = jax.jit(jax.vmap(lambda *tape: evaluate_with_jacobian(LANGUAGE, *tape, INPUTS)))
    return run(*tapes)


def naive(expression, x, v):
    """The formula at one point by Python's own complex numbers; NaN where it is undefined or not real."""
    import math

    numbers, stack = iter(np.asarray(expression.constants).tolist()), []
    table = {
        "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b,
        "/": lambda a, b: a / b, "neg": lambda a: -a, "abs": abs, "square": lambda a: a**2,
        "cube": lambda a: a**3, "sqrt": math.sqrt, "exp": math.exp, "log": math.log, "sin": math.sin,
        "cos": math.cos, "tanh": math.tanh,
    }  # fmt: skip
    for token in expression.tokens:
        if token in table:
            arity = symbolic.OPERATORS[token].arity
            arguments = [stack.pop() for _ in range(arity)][::-1]
            try:
                stack.append(table[token](*arguments))
            except (ValueError, ZeroDivisionError, OverflowError):
                return math.nan
            if not math.isfinite(stack[-1]):
                return math.nan
        else:
            stack.append(next(numbers) if token == "#" else {"x": float(x), "v": float(v)}[token])
    return stack[0]


def test_changed_tapes_are_expressions(tapes):
    arity = LANGUAGE.arity
    kinds = set()
    for codes in np.asarray(tapes.codes):
        used = codes[codes != PAD]
        assert (codes[len(used) :] == PAD).all() and len(used) > 0
        depth = np.cumsum(1 - arity[used])
        assert depth[-1] == 1 and (depth > 0).all()
        kinds |= set(used.tolist())
    assert kinds == set(range(1, len(arity)))  # every leaf and operator occurs


def test_a_tape_is_its_formula(tapes, values):
    """Also where the formula has no value: then the tape has none."""
    for codes, constants, row in zip(*tapes, values[0], strict=True):
        expression = from_tape(LANGUAGE, codes, constants)
        expected = [naive(expression, *point) for point in np.asarray(INPUTS).T]
        np.testing.assert_allclose(row, expected, rtol=1e-12, atol=1e-12)


def test_a_tape_is_its_sympy_export(tapes, values):
    x, v = sympy.symbols("x v", real=True)
    compared = 0
    for codes, constants, row in list(zip(*tapes, values[0], strict=True))[:80]:
        exported = from_tape(LANGUAGE, codes, constants).sympy()
        found = np.asarray(row)
        for at in np.flatnonzero(np.isfinite(found))[:3]:
            point = {x: float(INPUTS[0, at]), v: float(INPUTS[1, at])}
            expected = complex(sympy.N(exported.subs(point), 30))
            assert abs(expected - found[at]) <= 1e-12 * max(1.0, abs(expected))
            compared += 1
    assert compared > 100


def test_text_gives_the_same_formula_back(tapes):
    for codes, constants in list(zip(*tapes, strict=True))[:80]:
        expression = from_tape(LANGUAGE, codes, constants)
        again = symbolic.Expression.parse(str(expression), LANGUAGE.variables)
        assert again.tokens == expression.tokens
        np.testing.assert_array_equal(again.constants, expression.constants)
        for ours, theirs in zip(to_tape(LANGUAGE, again), (codes, constants), strict=True):
            where = np.asarray(codes) == CONSTANT if ours.dtype == float else slice(None)
            np.testing.assert_array_equal(ours[where], theirs[where])


def test_derivatives_by_the_constants_are_those_of_differences(tapes, values):
    step = 1e-6
    run = jax.jit(jax.vmap(lambda codes, c: evaluate(LANGUAGE, codes, c, INPUTS)))
    jacobian, is_constant = np.asarray(values[1]), np.asarray(tapes.codes) == CONSTANT
    assert (jacobian[~is_constant] == 0).all()
    checked = 0
    for place in range(8):
        shift = np.zeros(LANGUAGE.length)
        shift[place] = step
        up, down = (run(tapes.codes, tapes.constants + s * shift[None]) for s in (1, -1))
        difference = np.asarray(up - down) / (2 * step)
        rows = is_constant[:, place]
        smooth = np.isfinite(difference) & (np.abs(np.asarray(values[0])) < 1e2) & rows[:, None]
        smooth &= np.abs(difference) < 1e2
        np.testing.assert_allclose(
            jacobian[:, place][smooth], difference[smooth], rtol=1e-4, atol=1e-4
        )
        checked += int(smooth.sum())
    assert checked > 500


def test_no_value_where_the_formula_has_none():
    """x / x, 1 / (1 / x) and exp(log(x)) at x = 0: finite in floating point, or nearly."""
    for text in ("1.0 / (1.0 / x)", "x / x", "exp(log(x))", "tanh(log(x))", "sqrt(x - 1.0) * 0.0"):
        assert np.isnan(symbolic.Expression.parse(text, ("x",))(jnp.zeros(())))


def test_constants_are_fitted_by_least_squares():
    """Linear in two constants: one step of Gauss-Newton, here damped, reaches SciPy's answer."""
    language = Language(("x", "v"), ("+", "*", "sin"), 8)
    expression = symbolic.Expression.parse("0.1 * x + 0.2 * sin(v)", ("x", "v"))
    codes, constants = map(jnp.asarray, to_tape(language, expression))
    targets = 3 * INPUTS[0] - 9.81 * jnp.sin(INPUTS[1]) + 0.1 * jnp.cos(5 * INPUTS[0])
    fit = jax.jit(lambda *x: fit_constants(language, *x, steps=6))
    fitted, loss = fit(codes, constants, INPUTS, targets)
    basis = np.stack([INPUTS[0], np.sin(INPUTS[1])], axis=1)
    expected, squares, *_ = np.linalg.lstsq(basis, np.asarray(targets), rcond=None)
    fitted = np.asarray(fitted)[np.asarray(codes) == CONSTANT]
    np.testing.assert_allclose(fitted, expected, rtol=1e-6)
    np.testing.assert_allclose(loss, squares[0] / 12, rtol=1e-9)


def test_units_of_parts_must_agree():
    """x in meters, v in meters per second, the formula in meters; a number may have any unit."""
    units = symbolic.Units({"x": (1, 0), "v": (1, -1)}, (1, 0))
    cases = {
        "x + 3.0 * v": True,
        "x + v": False,
        "sin(x)": False,
        "sin(x / 2.0)": False,
        "x * sin(x / 2.0)": True,
        "v * v / x": False,
        "sqrt(square(x))": True,
        "2.0": True,
        "x / x": False,
        "x * sin(v / v)": True,
        "x * exp(v)": False,
    }
    expressions = [symbolic.Expression.parse(text, ("x", "v")) for text in cases]
    codes = jnp.stack([jnp.asarray(to_tape(LANGUAGE, e)[0]) for e in expressions])
    found = jax.jit(jax.vmap(lambda codes: agree(LANGUAGE, units, codes)))(codes)
    assert dict(zip(cases, found.tolist(), strict=True)) == cases


SMALL = {"islands": 8, "population": 64, "births": 32, "length": 8, "progress": False}
X = np.random.default_rng(0).uniform(0.0, 2.0, (40, 2))
Y = (X[:, :1] / (1.0 + X[:, :1])).copy()


@pytest.fixture(scope="module")
def fronts():
    run = lambda: symbolic.search(X, Y, variables=("x", "v"), generations=40, key=KEY, **SMALL)
    return run(), run()


def test_a_search_finds_the_formula(fronts):
    (front,), _ = fronts
    found = front.choose()
    x = sympy.Symbol("x", real=True)
    assert sympy.simplify(sympy.nsimplify(found.sympy(4), rational=True) - x / (1 + x)) == 0
    assert "x / (" in front.table() and "<-" in front.table()


def test_a_front_is_monotone_finite_and_the_same_for_the_same_key(fronts):
    (first,), (second,) = fronts
    assert (np.diff(first.losses) < 0).all() and (np.diff(first.complexities) > 0).all()
    assert np.isfinite(first.losses).all()
    assert [str(e) for e in first.expressions] == [str(e) for e in second.expressions]
    np.testing.assert_array_equal(first.losses, second.losses)
    for expression, loss in zip(*first, strict=True):
        misfit = np.asarray(expression(*jnp.asarray(X.T))) - Y[:, 0]
        np.testing.assert_allclose(np.mean(misfit**2) / Y.var(), loss, rtol=1e-6, atol=1e-20)


def test_the_oldest_die_and_the_hall_remembers():
    """Places are filled in turn, so the oldest are those behind the youngest."""
    settings = Settings(Language(("x", "v"), ("+", "-", "*", "/"), 8), 8, 64, 32, 8, 3, 0.0, None)
    data = (jnp.asarray(X.T), jnp.asarray(Y[:, 0]))
    states = [start(settings, data, KEY)]
    for generations in (1, 1, 5):
        states.append(advance(settings, states[-1], data, KEY, generations))
    first, second, third, last = (state.islands.tape.codes for state in states)
    np.testing.assert_array_equal(second[:, 32:], first[:, 32:])
    np.testing.assert_array_equal(third[:, :32], second[:, :32])
    # The founders are measured in turn, and stay as they are until that is done.
    np.testing.assert_array_equal(third, first)
    assert int(states[-1].generation) == 7 and (last != third).any()
    assert np.isfinite(np.asarray(states[1].islands.loss)[:, :32]).any()
    for before, after in zip(states, states[1:], strict=False):
        assert (np.asarray(after.hall.loss) <= np.asarray(before.hall.loss)).all()


def test_nothing_that_is_not_finite_enters_a_front():
    parse = lambda text: symbolic.Expression.parse(text, ("x",))
    expressions = [parse(t) for t in ("x", "x + 1.0", "x * x * x", "log(x) + x * 2.0 * x")]
    front = make_front(expressions, np.array([0.5, np.nan, 0.6, np.inf]))
    assert [str(e) for e in front.expressions] == ["x"] and front.losses.tolist() == [0.5]


def test_of_two_formulas_with_as_many_tokens_the_better_enters_a_front():
    expressions = [symbolic.Expression.parse(t, ("x",)) for t in ("1.0", "x + 1.0", "x * x")]
    front = make_front(expressions, np.array([1.0, 0.5, 0.2]))
    assert [str(e) for e in front.expressions] == ["1.0", "x * x"]
    assert np.isfinite(front.scores).all()


def test_the_choice_stops_where_tokens_buy_little():
    parse = lambda n: symbolic.Expression.parse(" + ".join(["x"] * n), ("x",))
    front = make_front([parse(n) for n in (1, 2, 3, 4, 5)], np.array([1.0, 0.9, 1e-5, 9e-6, 8e-6]))
    assert front.choose().complexity == 5  # 3 terms, 5 tokens
    assert front.choose(noise=0.95).complexity == 3
    assert front.choose(worth=20.0).complexity == 1


def decay(t, y, args):
    return -0.3 * y


def test_formulas_are_refined_through_the_solve_and_become_models(tmp_path):
    """Slopes from coarse data are biased; the solve gives the constants of the equation back."""

    def make_model(field):
        controller = diffrax.ConstantStepSize()
        return nde.NeuralODE(
            field, solver=diffrax.Heun(), stepsize_controller=controller, dt0=0.25, max_steps=32
        )

    parse = lambda texts: symbolic.Field.parse(texts, ("x", "v"))
    truth = make_model(parse(["0.7 * x - 1.3 * x * v", "0.9 * x * v - 0.5 * v"]))
    ts = jnp.linspace(0.0, 6.0, 25)
    y0s = jnp.array([[1.0, 0.5], [0.6, 1.2]])
    ys = jax.vmap(truth, in_axes=(None, 0))(ts, y0s)
    rough = parse(["0.6 * x - 1.2 * x * v", "0.8 * x * v - 0.6 * v"])
    fronts = [symbolic.Front((expression,), np.array([1e-3])) for expression in rough.expressions]
    hidden = ys.at[:, :, 1].set(jnp.nan)  # one state observed
    found = symbolic.refine(fronts, make_model, ts, y0s, hidden)
    constants = jnp.concatenate([e.constants for e in found.choose().expressions])
    np.testing.assert_allclose(constants, [0.7, 1.3, 0.9, 0.5], rtol=1e-5)
    assert found.losses[0] < 1e-10 and "<-" in found.table()

    model = found.model()
    np.testing.assert_allclose(model(ts, y0s[0]), ys[0], rtol=1e-4)
    gradient = eqx.filter_grad(lambda m: jnp.sum(m(ts, y0s[0]) ** 2))(model)
    assert all(np.abs(e.constants).min() > 0 for e in gradient.vector_field.expressions)
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", model)
    loaded = eqx.tree_deserialise_leaves(tmp_path / "model.eqx", make_model(rough))
    np.testing.assert_array_equal(loaded(ts, y0s[0]), model(ts, y0s[0]))
    text = str(model.vector_field).splitlines()
    again = make_model(parse(text))
    np.testing.assert_array_equal(again(ts, y0s[0]), model(ts, y0s[0]))


def test_slopes_of_a_polynomial_are_exact_at_irregular_times():
    ts = np.sort(np.random.default_rng(1).uniform(0.0, 2.0, 15))
    ys = np.stack([ts**3 - ts, 2.0 - ts**2], axis=1)
    states, rates = symbolic.slopes(ts, ys[None])
    np.testing.assert_allclose(states, ys, atol=1e-10)
    np.testing.assert_allclose(rates, np.stack([3 * ts**2 - 1, -2 * ts], axis=1), atol=1e-8)


def test_the_network_term_of_a_hybrid_model_is_distilled():
    seen = {}
    record = lambda x, y, **options: seen.update(x=x, y=y, **options)
    network = lambda t, y, args: jnp.sin(y[:1])
    hybrid = nde.HybridODE(
        lambda t, y, p: y, network, {"a": 1.0}, combine=lambda k, n, t, y, p, a: y
    )
    symbolic.distill(hybrid, X, by=record, variables=("x", "v"), key=KEY)
    np.testing.assert_allclose(seen["y"], np.sin(X[:, :1]))
    symbolic.distill(nde.NeuralODE(decay), X, by=record, variables=("x", "v"), key=KEY)
    np.testing.assert_allclose(seen["y"], -0.3 * X)


def refuse(**changes):
    given = {"inputs": X, "targets": Y, "variables": ("x", "v"), "key": KEY, "progress": False}
    given |= changes
    return symbolic.search(given.pop("inputs"), given.pop("targets"), **given)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"inputs": X[:5], "targets": Y[:5]}, ["5 points", "8 or more"]),
        ({"targets": np.ones_like(Y)}, ["`targets` is constant", "column 0"]),
        ({"targets": np.where(Y > 0.5, np.nan, Y)}, ["`targets` is nan", "finite"]),
        ({"targets": Y[:, 0]}, ["(40,)", "[:, None]"]),
        ({"inputs": -1 - X, "operators": ("sqrt", "log")}, ["`operators`", "not finite"]),
        ({"operators": ("+", "pow")}, ["`operators`", "'pow'"]),
        ({"generations": 0}, ["`generations` is 0"]),
        ({"seconds": 0.0}, ["`seconds` is 0.0"]),
        ({"variables": ("x",)}, ["`variables`", "2 different names"]),
        ({"births": 100}, ["`births` is 100", "64"]),
        ({"units": symbolic.Units({"x": (1,)}, (1,))}, ["`units`", "'v'"]),
    ],
)
def test_bad_input_of_a_search_is_named(changes, words):
    with pytest.raises(ValueError, match=mentions(words)):
        refuse(**changes)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: symbolic.Expression.parse("x ** 2.5", ("x",)), ["`text`", "x ** 2.5"]),
        (lambda: symbolic.Expression.parse("foo(x)", ("x",)), ["foo", "sin"]),
        (lambda: symbolic.Expression.parse("x +", ("x",)), ["`text`", "no formula"]),
        (lambda: to_tape(Language(("x",), ("+",), 2), symbolic.Expression.parse("x + x", ("x",))),
         ["3 tokens", "`length`"]),
        (lambda: symbolic.Units({"x": (1, 0)}, (1,)), ["`units`"]),
        (lambda: symbolic.slopes(np.arange(5.0), np.zeros((5, 1))), ["`window` is 7"]),
        (lambda: symbolic.Field.parse(["x"], ("x", "v"))(0.0, jnp.zeros(3)), ["`y0` has 3"]),
    ],
)  # fmt: skip
def test_bad_formulas_are_named(call, words):
    with pytest.raises(ValueError, match=mentions(words)):
        call()


def test_the_size_of_a_tape_is_its_number_of_tokens():
    tape = Tape(
        *map(jnp.asarray, to_tape(LANGUAGE, symbolic.Expression.parse("x + 1.0", ("x", "v"))))
    )
    assert int(complexity(tape.codes)) == 3
