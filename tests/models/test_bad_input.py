"""Bad input to a model or to `fit`: every row names the argument, its value and what to type."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from messages import mentions

import nde
from nde.hybrid import Bounded, Frozen, HybridODE, Positive
from nde.solvers import SolveError
from nde.train import Batch, NonFiniteError

KEY = jax.random.key(0)
TS, Y0 = jnp.linspace(0.0, 1.0, 5), jnp.ones(2)


def decay(t, y, args):
    return jax.tree.map(jnp.negative, y)


def mlp(**options):
    return nde.fields.MLPField(2, 4, 1, **({"key": KEY} | options))


def pid(rtol, atol):
    return {"stepsize_controller": diffrax.PIDController(rtol=rtol, atol=atol)}


def solve(ts=TS, y0=Y0, vector_field=decay, args=None, **numerics):
    return nde.NeuralODE(vector_field, **numerics)(ts, y0, args)


def add(known, network):
    return HybridODE(lambda t, y, p: known(y), lambda t, y, args: network(y), {})(TS, Y0)


def single_bounded(value):
    with jax.enable_x64(False):
        return Bounded(value, 0.0, 1.0)


def single_times(ts):
    with jax.enable_x64(False):
        return solve(ts=ts, y0=np.ones(2, np.float32))


def labeled():
    model = nde.NeuralODE(mlp())
    labels = jax.tree.map(lambda _: "all", eqx.filter(model, eqx.is_inexact_array))
    return fit(model, optim=optax.multi_transform({"all": optax.sgd(0.1)}, labels))


TIMES, YS, MASK = jnp.tile(TS, (4, 1)), jnp.ones((4, 5, 2)), jnp.ones((4, 5), bool)


def score(data, **options):
    batch = Batch(data, jnp.ones(4, bool), jnp.asarray(0))
    return nde.losses.trajectory(nde.NeuralODE(decay), batch, KEY, **options)


def at(values, index, value):
    return values.at[index].set(value)


CLIPPED = diffrax.ClipStepSizeController(diffrax.PIDController(rtol=-1e-3, atol=1e-6))
EARLY = jnp.asarray([1e8, 2e8], dtype=jnp.float32)
SINGLES = TS.astype(jnp.float32)
SINGLE = jnp.ones(2, dtype=jnp.float32)

# (row of the table of bad inputs, call, words of the message)
SOLVES = [
    (1, lambda: solve(ts=at(TS, 4, jnp.nan)), ["`ts` is nan at index 4", "`t1`", "finite"]),
    (2, lambda: solve(ts=at(TS, 4, jnp.inf)), ["inf", "`t1`", "steady_state_event"]),
    (3, lambda: solve(dt0=0.0), ["`dt0`", "zero", "dt0=None"]),
    (4, lambda: solve(dt0=np.nan), ["`dt0` is nan", "finite"]),
    (5, lambda: solve(dt0=-0.1), ["`dt0` is -0.1", "`t1 - t0` is 1.0"]),
    (6, lambda: solve(stepsize_controller=diffrax.ConstantStepSize()), ["dt0"]),
    (7, lambda: solve(ts=EARLY, y0=SINGLE, dt0=1.0), ["`dt0`", "8.0", "float64", "shift"]),
    (8, lambda: solve(max_steps=0), ["`max_steps` is 0", ">= 1"]),
    (8, lambda: solve(max_steps=-3), ["`max_steps` is -3", ">= 1"]),
    (9, lambda: solve(max_steps=None), ["max_steps"]),
    (10, lambda: solve(**pid(0.0, 0.0)), ["`rtol`", "`atol`", "positive"]),
    (11, lambda: solve(**pid(1e-3, -1e-6)), ["`atol` is -1e-06", "positive"]),
    (11, lambda: solve(stepsize_controller=CLIPPED), ["`rtol` is -0.001", "positive"]),
    (
        12,
        lambda: solve(ts=SINGLES, y0=SINGLE, **pid(1e-12, 1e-12)),
        ["`rtol`", "1.2e-06", "jax_enable_x64"],
    ),
    (15, lambda: solve(ts=at(TS, 1, 0.9)), ["`ts`", "ts[1]=0.9", "ts[2]=0.5"]),
    (16, lambda: solve(ts=at(TS, 2, jnp.nan)), ["`ts` is nan at index 2"]),
    (17, lambda: solve(ts=jnp.ones((3, 5))), ["`ts` has shape (3, 5)", "jax.vmap"]),
    (17, lambda: solve(ts=jnp.ones(0)), ["`ts` has shape (0,)", "at least one time"]),
    (17, lambda: solve(ts=jnp.arange(3)), ["`ts` has dtype int64", "astype(float)"]),
    (17, lambda: solve(ts=[0.0, 1.0]), ["`ts` is a list", "jnp.asarray"]),
    (
        None,
        lambda: single_times(1.7e9 + np.arange(3.0)),
        ["`ts` has neighbors 1.0 apart", "offset"],
    ),
    (
        18,
        lambda: solve(y0={"a": Y0, "b": at(Y0, 1, jnp.nan)}),
        ["`y0['b']` is nan", "(1,)", "finite"],
    ),
    (18, lambda: solve(y0=at(Y0, 0, jnp.inf)), ["`y0` is inf", "(0,)", "finite"]),
    (19, lambda: solve(y0=jnp.arange(2)), ["`y0` has dtype int64", "astype(float)"]),
    (20, lambda: solve(y0=Y0.astype(complex)), ["`y0` is complex", "two real"]),
    (21, lambda: solve(y0=[1.0, 2.0]), ["`y0[0]` is a Python float", "array"]),
    (22, lambda: solve(y0=jnp.ones(3), vector_field=mlp()), ["`y0` has shape (3,)", "(2,)"]),
    (
        22,
        lambda: solve(y0=jnp.ones(3), vector_field=lambda t, y, args: jnp.eye(2) @ y),
        ["`y0`", "[3]"],
    ),
    (
        23,
        lambda: solve(y0=jnp.ones((7, 2)), vector_field=mlp()),
        ["(7, 2)", "one example", "jax.vmap"],
    ),
    (24, lambda: solve(y0=jnp.ones(0)), ["`y0` has shape (0,)"]),
    (24, lambda: solve(y0={}), ["`y0` is {}", "at least one"]),
    (25, lambda: solve(vector_field=None), ["`vector_field` is None", "(t, y, args)"]),
    (25, lambda: solve(vector_field=lambda t, y, args: None), ["`vector_field` returned"]),
    (25, lambda: solve(vector_field=lambda t, y, args: [y]), ["`vector_field` returned"]),
    (25, lambda: solve(vector_field=lambda t, y, args: y[:1]), ["shape (1,)", "shape (2,)"]),
    (25, lambda: solve(vector_field=lambda t, y: y), ["`vector_field`", "(t, y)", "(t, y, args)"]),
    (
        26,
        lambda: solve(vector_field=lambda t, y, args: y[0]),
        ["`vector_field`", "shape ()", "(2,)"],
    ),
    (
        26,
        lambda: solve(vector_field=lambda t, y, args: 1.0),
        ["`vector_field`", "shape ()", "(2,)"],
    ),
    (
        27,
        lambda: solve(vector_field=lambda t, y, args: jnp.ones(2, int)),
        ["dtype int64", "astype"],
    ),
    (34, lambda: solve(solver=diffrax.Tsit5), ["`solver` is the class Tsit5", "`Tsit5()`"]),
    (34, lambda: solve(adjoint=diffrax.DirectAdjoint), ["`adjoint`", "`DirectAdjoint()`"]),
    (34, lambda: solve(solver="tsit5"), ["`solver` is 'tsit5'", "AbstractSolver"]),
    (45, lambda: mlp(key=0), ["`key` is 0", "jax.random.key(0)"]),
    (45, lambda: mlp(key=None), ["`key` is None", "jax.random.key(0)"]),
    (45, lambda: mlp(key=jax.random.split(KEY)), ["`key`", "(2,)", "jax.random.key(0)"]),
    (54, lambda: solve(vector_field=mlp(context=3)), ["`args`", "(3,)", "time is not a channel"]),
    (54, lambda: solve(vector_field=mlp(), args=Y0), ["`args`", "no context", "never see it"]),
    (54, lambda: HybridODE(decay, mlp(), {})(TS, Y0, Y0), ["`args`", "MLPField", "no context"]),
    (54, lambda: mlp(scale=np.ones(3)), ["`scale` has shape (3,)", "(2,)"]),
    (None, lambda: solve(y0={"a": Y0}, augment=1), ["`y0`", "`augment`", "(channels,)"]),
    (None, lambda: HybridODE(None, None, {}), ["`known` is None", "(t, y, parameters)"]),
    (34, lambda: solve(vector_field=nde.fields.MLPField), ["`vector_field` is the class MLPField"]),
    (
        34,
        lambda: HybridODE(decay, None, {"k": Positive}),
        ["the class Positive", "Positive(value)"],
    ),
    (None, labeled, ["`optim` cannot be used", "lambda params: labels"]),
    (None, lambda: HybridODE(decay, 3.0, {}), ["`network` is 3.0", "(t, y, args)"]),
    (None, lambda: HybridODE(decay, decay, {}, combine=decay), ["`combine`", "(known, network"]),
    (None, lambda: Positive(-1.0), ["`value` of Positive is -1.0", "between 0.0 and inf"]),
    (None, lambda: Bounded(2.0, 0.0, 1.0), ["`value` of Bounded is 2.0", "between 0.0 and 1.0"]),
    (None, lambda: Positive(np.inf), ["`value` of Positive is inf"]),
    (None, lambda: Positive(1e-310), ["`value` of Positive is 1e-310", "rounding of float64"]),
    (None, lambda: single_bounded(1 - 1e-9), ["0.999999999", "0.0 and 1.0", "rounding of float32"]),
    (None, lambda: Bounded(np.nextafter(1, 0), 0.0, 1.0), ["`value` of Bounded", "rounding"]),
    (None, lambda: Bounded(2.0, 1.0, np.inf), ["`high` of Bounded is inf", "finite", "Positive"]),
    (None, lambda: Bounded(0.5, 1.0, 0.0), ["`low` of Bounded is 1.0 and `high` is 0.0"]),
    (None, lambda: Bounded(0.5, np.zeros(2), 1.0), ["`low` of Bounded is [0. 0.]", "each entry"]),
    (None, lambda: Bounded(0.5, None, 1.0), ["`low` of Bounded is None", "one finite number"]),
    (
        None,
        lambda: add(lambda y: y, lambda y: y[:1]),
        ["`known` returned shape (2,)", "`network`", "(1,)", "`combine`"],
    ),
    (
        None,
        lambda: add(lambda y: y[0], lambda y: y),
        ["`known` returned shape ()", "`network` returned shape (2,)"],
    ),
    (None, lambda: solve(augment=-1), ["`augment` is -1", "integer >= 0"]),
    (None, lambda: solve(augment=1.0), ["`augment` is 1.0", "integer >= 0"]),
    (None, lambda: nde.losses.mse(Y0, jnp.ones(3)), ["`prediction`", "(2,)", "(3,)"]),
    (None, lambda: nde.losses.mse(Y0, Y0, jnp.ones(3, bool)), ["`mask`", "(3,)", "(2,)"]),
    (None, lambda: nde.losses.log_mse(Y0, Y0, jnp.ones(3, bool)), ["`mask`", "(3,)", "(2,)"]),
    (None, lambda: nde.losses.mse(Y0, Y0, jnp.ones(2)), ["`mask`", "float64", "boolean"]),
    (None, lambda: nde.losses.log_mse(Y0, Y0, jnp.ones(2)), ["`mask`", "float64", "boolean"]),
    (None, lambda: score({"ts": TIMES, "ys": YS}), ["`batch.data`", "{'ts': f64[4,5]", "(ts, ys)"]),
    (None, lambda: score((TIMES, YS, MASK, YS)), ["`batch.data`", "bool[4,5]", "(ts, ys, mask)"]),
    (None, lambda: score([(TIMES, YS), (TIMES, YS)]), ["`batch.data`", "iter(batches)"]),
    (None, lambda: score((TS, YS)), ["`batch.data`", "f64[5]", "jnp.tile"]),
    (None, lambda: score((TIMES[:, :1], YS[:, :1])), ["f64[4,1]", "two times"]),
    (None, lambda: score((TIMES, YS, MASK.astype(int))), ["`mask`", "int64", "boolean"]),
    (None, lambda: score((TIMES, YS, MASK[:, 1:])), ["`mask`", "(4, 4)", "(4, 5)"]),
    (None, lambda: score((TIMES, YS), horizon=0.5), ["`horizon` is 0.5", "horizon(step)"]),
    (
        None,
        lambda: nde.losses.trajectory(None, (TIMES, YS), KEY),
        ["`batch` is (f64[4,5]", "nde.train.Batch((ts, ys))"],
    ),
]

SHAPES_AND_TYPES = {8, 10, 11, 12, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 34}


@pytest.mark.parametrize("row, call, fragments", SOLVES)
def test_a_solve_says_what_is_wrong(row, call, fragments):
    with pytest.raises(ValueError, match=mentions(fragments)):
        call()


@pytest.mark.parametrize("row, call, fragments", [s for s in SOLVES if s[0] in SHAPES_AND_TYPES])
def test_and_says_it_while_it_is_compiled(row, call, fragments):
    with pytest.raises(ValueError, match=mentions(fragments)):
        eqx.filter_jit(call)()


def loss(model, batch, key):
    return jnp.mean((batch.data[0] @ model["w"] - batch.data[1]) ** 2)


def fit(model=None, loss=loss, data=None, **options):
    model = {"w": jnp.ones(3)} if model is None else model
    data = (jnp.ones((6, 3)), jnp.zeros(6)) if data is None else data
    standard = {"optim": optax.sgd(0.1), "steps": 30, "progress": False, "key": KEY}
    return nde.fit(model, loss, data, **(standard | options))


HOLE = (np.ones((6, 3)), np.where(np.arange(6) % 4 == 1, np.nan, 0.0))
INFINITE = (np.ones((6, 3)), np.where(np.arange(6) % 4 == 1, np.inf, 0.0))
BATCH = (jnp.ones((4, 3)), jnp.zeros(4))
LONGER = (jnp.ones((5, 3)), jnp.zeros(5))
WIDER = (jnp.ones((4, 2)), jnp.zeros(4))
SINGLE_BATCH = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), BATCH)
DAYS = np.array(["2020-01-01", "2020-01-02"], "datetime64[D]")


def not_finite(model, batch, key):
    return loss(model, batch, key) * jnp.where(batch.step > 3, jnp.nan, 1.0)


def bad_gradient(model, batch, key):
    return loss(model, batch, key) + 0.0 * jnp.sqrt(jnp.sum((model["w"] - model["w"]) ** 2))


def half_failed(model, batch, key):
    return loss(model, batch, key), {"failed": jnp.where(batch.step < 5, 0.05, 0.5)}


FITS = [
    (45, ValueError, {"key": 0}, ["`key` is 0", "jax.random.key(0)"]),
    (45, ValueError, {"key": jax.random.split(KEY)}, ["`key`", "(2,)", "jax.random.key(0)"]),
    (55, ValueError, {"data": {"x": Y0, "y": TS}}, ["data['x']", "2", "data['y']", "5"]),
    (55, ValueError, {"data": {"x": 1.0}}, ["`data['x']`", "leading example axis"]),
    (55, ValueError, {"data": [[1.0, 2.0]]}, ["`data[0][0]` is 1.0", "np.asarray(data)"]),
    (55, ValueError, {"data": ()}, ["`data` holds no array"]),
    (55, ValueError, {"data": (jnp.ones((0, 3)), jnp.ones(0))}, ["no examples"]),
    (55, ValueError, {"data": iter([BATCH] * 7)}, ["ended after 7 batches", "itertools.cycle"]),
    (55, ValueError, {"data": iter([BATCH, LONGER])}, ["5 examples", "first one of 4"]),
    (55, ValueError, {"data": iter([BATCH, WIDER])}, ["[4, 2]", "[4, 3]", "pad_series"]),
    (55, ValueError, {"data": iter([BATCH, SINGLE_BATCH])}, ["float32[4]", "float64[4]"]),
    (55, ValueError, {"data": iter([BATCH, BATCH[:1]])}, ["('float64[4, 3]',)", "first one of"]),
    (55, ValueError, {"data": {"x": DAYS}}, ["`data['x']`", "datetime64[D]", "floats"]),
    (55, ValueError, {"data": np.array(["a", "b"])}, ["`data`", "<U1", "integers"]),
    (55, ValueError, {"data": np.array([None, 1.0])}, ["`data`", "object", "numbers"]),
    (56, ValueError, {"batch_size": True}, ["`batch_size` is True", "integer"]),
    (56, ValueError, {"batch_size": 2.0}, ["`batch_size` is 2.0", "integer"]),
    (56, ValueError, {"steps": 2.0}, ["`steps` is 2.0", "integer"]),
    (56, ValueError, {"batch_size": 0}, ["`batch_size` is 0", "6 examples"]),
    (56, ValueError, {"batch_size": -1}, ["`batch_size` is -1", "6 examples"]),
    (56, ValueError, {"batch_size": 7}, ["`batch_size` is 7", "6 examples"]),
    (56, ValueError, {"batch_size": 2, "data": iter([BATCH])}, ["`batch_size` is 2", "iterator"]),
    (56, ValueError, {"steps": -1}, ["`steps` is -1", ">= 0"]),
    (56, ValueError, {"max_skips": 0}, ["`max_skips` is 0", ">= 1"]),
    (57, ValueError, {"loss": lambda m, b, k: m["w"]}, ["`loss`", "(3,)", "float64", "jnp.mean"]),
    (57, ValueError, {"loss": lambda m, b, k: jnp.sum(b.mask)}, ["`loss`", "int64", "jnp.mean"]),
    (57, ValueError, {"loss": lambda m, b, k: None}, ["`loss` returned None", "jnp.mean"]),
    (57, ValueError, {"loss": lambda m, b, k: (m["w"][0], 1.0)}, ["metrics 1.0", "dict"]),
    (57, ValueError, {"loss": lambda m, b, k: (m["w"][0], m)}, ["metric 'w'", "f64[3]"]),
    (57, ValueError, {"loss": lambda m, b, k: (m["w"][0], {"a": None})}, ["metric 'a', None"]),
    (57, ValueError, {"loss": lambda m, b, k: (m["w"][0], {3: 1.0})}, ["metric 3", "string"]),
    (
        57,
        ValueError,
        {"loss": lambda m, b, k: (m["w"][0], {"failed": jnp.nan})},
        ["`failed` = nan at step 0", "share"],
    ),
    (
        57,
        ValueError,
        {"loss": lambda m, b, k: (m["w"][0], {"a": m})},
        ["metric 'a', {'w': f64[3]}"],
    ),
    (57, ValueError, {"loss": lambda m, b, k: (m["w"][0], {"a": k})}, ["metric 'a', key<fry>[]"]),
    (57, ValueError, {"loss": "mse"}, ["`loss` is 'mse'", "(model, batch, key)"]),
    (57, ValueError, {"loss": lambda m, b: 0.0}, ["`loss` has signature (m, b)"]),
    (58, ValueError, {"model": nde.NeuralODE}, ["`model` is the class NeuralODE"]),
    (58, ValueError, {"model": {"n": jnp.arange(3)}}, ["nothing to train", "model['n']"]),
    (58, ValueError, {"model": {"w": Frozen(1.0)}}, ["nothing to train", "model['w']"]),
    (58, ValueError, {"frozen": lambda m: m["w"]}, ["nothing to train", "model['w']"]),
    (
        58,
        ValueError,
        {"loss": lambda m, b, k: jnp.sum(b.data[0])},
        ["gradient of zero", "model['w']"],
    ),
    (58, ValueError, {"frozen": lambda m: None}, ["`frozen` gave None", "nodes"]),
    (58, ValueError, {"frozen": lambda m: (m, m["w"])}, ["({'w': f64[3]}, f64[3])", "nodes"]),
    (59, ValueError, {"optim": optax.adam}, ["`optim`", "optax.adam(1e-3)"]),
    (59, ValueError, {"optim": 1e-3}, ["`optim` is 0.001", "optax.adam(1e-3)"]),
    (59, ValueError, {"optim": optax.constant_schedule(1.0)}, ["`optim`", "optax.adam(1e-3)"]),
    (60, NonFiniteError, {"data": HOLE}, ["data[1]", "2 of 6 examples", "[1, 5]", "step 0"]),
    (60, NonFiniteError, {"data": iter([HOLE] * 30)}, ["data[1]", "of batch 0", "[1, 5]"]),
    (60, NonFiniteError, {"data": INFINITE}, ["data[1]", "infinite in 2 of 6 examples", "[1, 5]"]),
    (61, NonFiniteError, {"loss": not_finite}, ["value of the loss", "step 13", "[0, 1, 2"]),
    (61, NonFiniteError, {"loss": bad_gradient}, ["gradient of `model['w']`", "step 9"]),
    (61, NonFiniteError, {"optim": optax.sgd(jnp.inf)}, ["update of `model['w']`", "step 9"]),
    (62, SolveError, {"loss": half_failed}, ["50% of the solves failed at step 5", "10%"]),
]


@pytest.mark.parametrize("row, kind, options, fragments", FITS)
def test_fit_says_what_is_wrong(row, kind, options, fragments):
    with pytest.raises(kind, match=mentions(fragments)):
        fit(**options)


def test_integers_that_jax_would_wrap():
    labels = np.array([0, 2**40])
    with (
        jax.enable_x64(False),
        pytest.raises(ValueError, match=mentions(["1099511627776", "int32"])),
    ):
        fit(data=labels)


def test_tolerances_that_float32_just_resolves():
    """The model refuses what its adjoint refuses, and no more."""
    ys = solve(ts=SINGLES, y0=SINGLE, **pid(1e-6, 1e-6))
    np.testing.assert_allclose(ys[:, 0], np.exp(-np.asarray(TS)), rtol=1e-5)
    small = solve(ts=SINGLES, y0=1e-9 * SINGLE, **pid(0.0, 1e-13))
    np.testing.assert_allclose(small[:, 0], 1e-9 * np.exp(-np.asarray(TS)), rtol=1e-3)


def test_adaptive_steps_need_an_error_estimate():
    """Row 13: diffrax says it well, with an error of its own."""
    with pytest.raises(RuntimeError, match="does not provide error estimates"):
        solve(solver=diffrax.Euler())


def test_an_overflowing_trial_step_is_no_error():
    """Row 33: y' = e^y (5 - y) is smooth; a first step that is too long overflows in its stages."""
    ys = solve(
        ts=jnp.array([0.0, 0.5, 1.0]),
        y0=jnp.array([0.0]),
        vector_field=lambda t, y, args: jnp.exp(y) * (5 - y),
        dt0=100.0,
    )
    assert float(ys[-1, 0]) == pytest.approx(5.0, abs=1e-2)
