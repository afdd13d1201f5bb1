"""The adjoint under every transformation of jax, against one diffrax gradient per example."""

import functools as ft
import re

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from oracles import CONSTANT, DIFFRAX, OURS, PARAMS, Y0, relative, solve, weigh
from sweeps import sweep

from nde.solvers import DiscreteAdjoint, Estimates, ReversibleAdjoint, ReversibleHeun

LANES, MEMBERS = 3, 2
PID = dfx.PIDController(rtol=1e-4, atol=1e-6)
CONTROLLERS = {"adaptive": PID, "constant": CONSTANT}


def field(t, y, args):
    """The rate is the lane's own: its steps are as many times shorter."""
    p, rate = args
    return rate * jnp.tanh(p["w"] @ y + p["b"] * jnp.sin(3.0 * rate * t))


def loss(p, y, rate, t0, t1, ts, *, adjoint=OURS, controller=PID):
    sol = solve(
        y, (p, rate), vector_field=field, solver=dfx.Bosh3(), t0=t0, t1=t1, adjoint=adjoint,
        stepsize_controller=controller, saveat=dfx.SaveAt(ts=ts, t1=True), max_steps=128,
    )  # fmt: skip
    return weigh(sol.ys)


MOVING = (0, 1, 2)  # p, y, rate
STACK = jax.tree.map(lambda x: jnp.stack([x, 1.2 * x]), PARAMS)
MEMBER = [jax.tree.map(lambda x, i=i: x[i], STACK) for i in range(MEMBERS)]
YS = jnp.stack([Y0, -0.5 * Y0, Y0[::-1]])
RATES = jnp.array([0.3, 6.0, 1.0])
T0, T1 = jnp.array([0.0, 0.1, -0.3]), jnp.array([1.0, 1.2, 0.3])
TS = T0[:, None] + jnp.outer(T1 - T0, jnp.array([0.0, 0.37, 0.8]))
DATA = (YS, RATES, T0, T1, TS)


@ft.cache
def expected(controller):
    """Value and gradient of every example with every member, one after the other, by diffrax."""
    theirs = ft.partial(loss, adjoint=DIFFRAX, controller=CONTROLLERS[controller])
    one = jax.jit(jax.value_and_grad(theirs, argnums=MOVING))
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    lane = lambda p, i: one(p, *(x[i] for x in DATA))
    return stack([stack([lane(p, i) for i in range(LANES)]) for p in MEMBER])


def of_member(tree, m):
    return jax.tree.map(lambda x: x[m], tree)


def total(grads, axis=0):
    """Parameters summed over the examples, the rest one by one."""
    return (jax.tree.map(lambda x: jnp.sum(x, axis), grads[0]), *grads[1:])


def batched(fn):
    return jax.vmap(fn, in_axes=(None, 0, 0, 0, 0, 0))


# Step sizes follow an error estimate, which is a small difference of large numbers.
NEAR = {"adaptive": 1e-9, "constant": 1e-12}


@pytest.mark.parametrize("controller", sweep(CONTROLLERS, "adaptive"))
def test_batch_then_gradient_and_gradient_then_batch(controller):
    """Batched times, outputs and arguments; the parameters are shared."""
    ours = ft.partial(loss, controller=CONTROLLERS[controller])
    summed = lambda p, *data: jnp.sum(batched(ours)(p, *data))
    together = jax.jit(jax.grad(summed, argnums=MOVING))(PARAMS, *DATA)
    values, apart = jax.jit(batched(jax.value_and_grad(ours, argnums=MOVING)))(PARAMS, *DATA)
    want_values, want = of_member(expected(controller), 0)
    assert relative((values, apart), (want_values, want)) < NEAR[controller]
    assert relative(together, total(want)) < NEAR[controller]
    assert relative(together, total(apart)) < 1e-12


def test_steps_of_the_lanes_differ():
    sol = jax.vmap(lambda y, r, t0, t1: solve(y, (PARAMS, r), vector_field=field, t0=t0, t1=t1))(
        YS, RATES, T0, T1
    )
    steps = sol.stats["num_accepted_steps"]
    assert max(steps) > 3 * min(steps)


def test_eager_single_example():
    got = jax.value_and_grad(loss, argnums=MOVING)(PARAMS, *(x[1] for x in DATA))
    assert relative(got, of_member(of_member(expected("adaptive"), 0), 1)) < NEAR["adaptive"]


@pytest.mark.parametrize("controller", sweep(CONTROLLERS, "constant"))
def test_ensembles(controller):
    """Members of their own parameters over shared examples: three orders, one answer."""
    ours = ft.partial(loss, controller=CONTROLLERS[controller])
    grid = jax.vmap(batched(ours), in_axes=(0, None, None, None, None, None))
    outside = jax.grad(lambda p, *data: jnp.sum(grid(p, *data)), argnums=MOVING)
    inside = jax.vmap(
        jax.grad(lambda p, *data: jnp.sum(batched(ours)(p, *data)), argnums=MOVING),
        in_axes=(0, None, None, None, None, None),
    )
    _, want = expected(controller)
    per_member = (jax.tree.map(lambda x: jnp.sum(x, 1), want[0]), *want[1:])
    over_all = (per_member[0], *(jnp.sum(x, 0) for x in per_member[1:]))
    assert relative(jax.jit(outside)(STACK, *DATA), over_all) < NEAR[controller]
    assert relative(jax.jit(inside)(STACK, *DATA), per_member) < NEAR[controller]


def test_three_levels():
    """vmap(grad(vmap(vmap))): members apart; examples and a scale of the state summed."""
    scales = jnp.array([1.0, 0.5])

    def one(p, scale, y, *rest):
        return loss(p, scale * y, *rest, controller=CONSTANT)

    by_scale = jax.vmap(one, in_axes=(None, 0, None, None, None, None, None))
    grid = jax.vmap(by_scale, in_axes=(None, None, 0, 0, 0, 0, 0))
    gradient = jax.grad(lambda p, *data: jnp.sum(grid(p, scales, *data)))
    got = jax.jit(jax.vmap(gradient, in_axes=(0,) + (None,) * 5))(STACK, *DATA)
    single = jax.jit(jax.grad(ft.partial(loss, controller=CONSTANT)))
    for m, p in enumerate(MEMBER):
        parts = [single(p, s * y, *rest) for s in scales for y, *rest in zip(*DATA, strict=True)]
        want = jax.tree.map(lambda *x: sum(x), *parts)
        assert relative(of_member(got, m), want) < 1e-12


@pytest.mark.parametrize(
    "solver, adjoint",
    [(dfx.Bosh3(), OURS), (ReversibleHeun(), ReversibleAdjoint(estimates=Estimates()))],
)
def test_no_lanes(solver, adjoint):
    """A map over no examples has empty results, and gradient zero for what the examples share."""
    none = jnp.zeros((0, *Y0.shape))

    def one(p, y):
        options = dict(solver=solver, adjoint=adjoint, stepsize_controller=PID)
        return solve(y, (p, 1.0), vector_field=field, **options).ys

    each = jax.vmap(one, in_axes=(None, 0))
    together = jax.grad(lambda p, ys: jnp.sum(each(p, ys)), argnums=(0, 1))(PARAMS, none)
    assert each(PARAMS, none).shape[::2] == none.shape
    assert relative(together, (jax.tree.map(jnp.zeros_like, PARAMS), none)) == 0
    apart = jax.vmap(jax.grad(lambda p, y: jnp.sum(one(p, y))), in_axes=(None, 0))(PARAMS, none)
    assert apart["w"].shape == (0, *PARAMS["w"].shape)
    outer = jax.vmap(each, in_axes=(None, 0))
    assert outer(PARAMS, jnp.zeros((0, 2, *Y0.shape))).shape[:2] == (0, 2)


def test_axes_that_are_not_in_front():
    """The mapped axis may stand anywhere, and an operand may be captured."""
    args = (T0[0], T1[0], TS[0])
    with_rate = jax.jit(jax.grad(lambda y: loss(PARAMS, y, RATES[0], *args)))
    got = jax.vmap(with_rate, in_axes=1, out_axes=1)(YS.T)
    want = jnp.stack([with_rate(y) for y in YS], axis=1)
    assert relative(got, want) < 1e-12


def test_only_the_times_are_batched():
    gradient = jax.jit(lambda t1: jax.grad(loss)(PARAMS, Y0, RATES[1], 0.0, t1, t1 * TS[0]))
    apart = [gradient(t1) for t1 in T1]
    together = jax.vmap(gradient)(T1)
    assert relative(together, jax.tree.map(lambda *x: jnp.stack(x), *apart)) < 1e-12


def test_batched_tolerances():
    """The controller may differ from lane to lane; it takes no gradient."""

    def run(rtol, y):
        controller = dfx.PIDController(rtol=rtol, atol=1e-8)
        return loss(PARAMS, y, RATES[2], T0[0], T1[0], TS[0], controller=controller)

    rtols = jnp.array([1e-3, 1e-6])
    gradient = jax.jit(jax.grad(run, argnums=1))
    got = jax.vmap(gradient, in_axes=(0, None))(rtols, Y0)
    want = jnp.stack([gradient(rtol, Y0) for rtol in rtols])
    assert relative(got, want) < 1e-12
    assert relative(got[0], got[1]) > 1e-8


@pytest.mark.parametrize("wrap", ["checkpoint", "scan", "map"])
def test_inside_other_control_flow(wrap):
    """A solve in a remat block, a scan and a sequential map: all sum the examples."""
    gradient = ft.partial(jax.grad, argnums=0)

    def checkpointed(p):
        return sum(jax.checkpoint(loss)(p, *(x[i] for x in DATA)) for i in range(LANES))

    def scanned(p):
        return jax.lax.scan(lambda c, data: (c + loss(p, *data), None), 0.0, DATA)[0]

    def mapped(p):
        return jnp.sum(jax.lax.map(lambda data: loss(p, *data), DATA))

    fn = {"checkpoint": checkpointed, "scan": scanned, "map": mapped}[wrap]
    _, want = of_member(expected("adaptive"), 0)
    assert relative(jax.jit(gradient(fn))(PARAMS), total(want)[0]) < NEAR["adaptive"]


def test_jacobians():
    """`jacrev` pulls many cotangents back through one solve: row by row the same gradients."""

    def outputs(y):
        options = dict(solver=dfx.Bosh3(), saveat=dfx.SaveAt(ts=TS[0]), max_steps=32)
        return solve(y, (PARAMS, 1.0), vector_field=field, **options).ys

    row = jax.jit(jax.grad(lambda y, i: outputs(y).ravel()[i]))
    want = jnp.stack([jnp.stack([row(y, i) for i in range(9)]) for y in YS]).reshape(3, 3, 3, 3)
    assert relative(jax.jit(jax.vmap(jax.jacrev(outputs)))(YS), want) < 1e-12
    assert relative(jax.jit(jax.jacrev(outputs))(Y0), want[0]) < 1e-12


# --- devices -------------------------------------------------------------------------------------


def computations(hlo):
    """The text of every computation of a compiled module, by name."""
    starts = list(re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", hlo, re.M))
    ends = [m.start() for m in starts[1:]] + [len(hlo)]
    return {m.group(1): hlo[m.start() : end] for m, end in zip(starts, ends, strict=True)}


def inside_loops(hlo):
    """The text of all that a `while` runs."""
    parts = computations(hlo)
    todo = [name for text in parts.values() for name in re.findall(r"body=%?([\w.\-]+)", text)]
    seen = set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += [other for other in re.findall(r"%([\w.\-]+)", parts[name]) if other in parts]
    assert seen
    return "\n".join(parts[name] for name in seen)


REDUCE = re.compile(r" all-reduce(?:-start)?\(")


def test_shard_map_reduces_once():
    """Two devices, unequal lanes: the gradient of one device, one all-reduce, none in a loop."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), DATA)
    summed = jax.value_and_grad(lambda p, *data: jnp.sum(batched(loss)(p, *data)))

    def step(p, *data):
        return jax.lax.psum(summed(p, *data), "data")

    sharded = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(P(),) + (P("data"),) * 5, out_specs=P(), check_vma=False
        )
    )
    compiled = sharded.lower(PARAMS, *data).compile()
    assert relative(compiled(PARAMS, *data), jax.jit(summed)(PARAMS, *data)) < 1e-12
    hlo = compiled.as_text()
    assert len(REDUCE.findall(hlo)) == 1
    assert not REDUCE.search(inside_loops(hlo))


def test_a_reduction_in_a_loop_would_be_seen():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    looped = lambda x: jax.lax.fori_loop(0, 3, lambda i, s: jax.lax.psum(jnp.sin(s), "data"), x)
    fn = jax.shard_map(looped, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
    hlo = jax.jit(fn).lower(jnp.ones(2)).compile().as_text()
    assert REDUCE.search(inside_loops(hlo))


# --- cost ----------------------------------------------------------------------------------------


def test_parameter_cotangents_are_not_kept_per_lane():
    """Temporary memory per further lane stays below one copy of the parameters."""
    size = 128
    w, few = jnp.eye(size) / 2, DiscreteAdjoint(checkpoints=2)

    def one(w, y):
        field = lambda t, y, args: jnp.tanh(args @ y)
        options = dict(adjoint=few, stepsize_controller=CONSTANT, dt0=0.25, max_steps=4)
        return jnp.sum(solve(y, w, vector_field=field, solver=dfx.Heun(), **options).ys)

    shared = jax.grad(lambda w, ys: jnp.sum(jax.vmap(one, in_axes=(None, 0))(w, ys)))
    apart = lambda w, ys: jnp.sum(jax.vmap(jax.grad(one), in_axes=(None, 0))(w, ys), axis=0)

    def bytes_per_lane(fn):
        temporary = []
        for lanes in (4, 36):
            compiled = jax.jit(fn).lower(w, jnp.ones((lanes, size))).compile()
            temporary.append(compiled.memory_analysis().temp_size_in_bytes)
        return (temporary[1] - temporary[0]) / 32

    assert bytes_per_lane(shared) < 0.3 * w.nbytes
    assert bytes_per_lane(apart) > w.nbytes  # each example has its own there, and it is seen


def test_the_field_is_traced_a_few_times_and_once():
    """Bosh3: 4 stages in the attempt, 3 or 4 in the step that is differentiated, and for its shapes."""
    traces = []

    def counted(t, y, args):
        traces.append(None)
        return field(t, y, args)

    def one(p, y):
        return weigh(solve(y, (p, 1.0), vector_field=counted, solver=dfx.Bosh3()).ys)

    gradient = jax.jit(jax.grad(lambda p, ys: jnp.sum(jax.vmap(one, in_axes=(None, 0))(p, ys))))
    first = gradient(PARAMS, YS)
    assert len(traces) <= 16
    traces.clear()
    assert relative(gradient(PARAMS, 1.0 * YS), first) == 0
    assert not traces and gradient._cache_size() == 1


def test_a_second_eager_gradient_traces_nothing():
    traces = []

    def counted(t, y, args):
        traces.append(None)
        return field(t, y, args)

    def one(y):
        return weigh(solve(y, (PARAMS, 1.0), vector_field=counted, solver=dfx.Bosh3()).ys)

    jax.grad(lambda ys: jnp.sum(jax.vmap(one)(ys)))(YS)
    traces.clear()
    jax.grad(lambda ys: jnp.sum(jax.vmap(one)(ys)))(2.0 * YS)
    assert not traces


# --- leaves and dtypes -----------------------------------------------------------------------


def test_arguments_that_are_not_numbers():
    """Integers, Booleans and keys travel along, batched or not; only floats have a gradient."""

    def vector_field(t, y, args):
        noise = jax.random.normal(args["key"], (3,))
        drift = args["w"] @ y + 0.1 * args["n"].astype(y.dtype) * noise
        return jnp.where(args["flag"], drift, -drift) / args["text"][1]

    static = {"n": jnp.arange(3), "text": ("name", 2.0)}
    keys = jax.random.split(jax.random.key(3), LANES)
    flags = jnp.array([True, False, True])

    def one(adjoint, w, y, key, flag):
        args = static | {"w": w, "key": key, "flag": flag}
        options = dict(vector_field=vector_field, adjoint=adjoint, solver=dfx.Bosh3())
        return weigh(solve(y, args, **options).ys)

    summed = lambda w: jnp.sum(jax.vmap(ft.partial(one, OURS, w))(YS, keys, flags))
    got = jax.jit(jax.grad(summed))(PARAMS["w"])
    theirs = jax.jit(jax.grad(ft.partial(one, DIFFRAX)))
    want = sum(theirs(PARAMS["w"], *lane) for lane in zip(YS, keys, flags, strict=True))
    assert relative(got, want) < NEAR["adaptive"]


def test_single_precision():
    """Within 1e-4 of float64. Times are float32 too: others make diffrax promote the state."""
    single = ft.partial(jax.tree.map, lambda x: x.astype(np.float32))

    def rate_of_change(t, y, args):
        return jnp.tanh(args["w"] @ y + args["b"] * jnp.sin(3.0 * t).astype(y.dtype))

    def one(time, params, y):
        sol = solve(
            y, params, vector_field=rate_of_change, t0=time(0), t1=time(1), dt0=time(0.125),
            stepsize_controller=CONSTANT,
            saveat=dfx.SaveAt(t1=True, steps=2), max_steps=32, solver=dfx.Bosh3(),
        )  # fmt: skip
        return weigh(sol.ys)

    def gradient(time, p, ys):
        summed = lambda p: jnp.sum(jax.vmap(lambda y: one(time, p, y))(ys))
        return jax.jit(jax.grad(summed))(p)

    got = gradient(np.float32, single(PARAMS), single(YS))
    want = gradient(np.float64, PARAMS, YS)
    for name in PARAMS:
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-4)


def test_without_compilation():
    few = DiscreteAdjoint(checkpoints=2)
    options = dict(adjoint=few, solver=dfx.Heun(), stepsize_controller=CONSTANT, dt0=0.25)
    gradient = jax.grad(lambda y: weigh(solve(y, max_steps=4, **options).ys))
    with jax.disable_jit():
        got = gradient(Y0)
    assert relative(got, gradient(Y0)) < 1e-12


def test_prints_and_checks_inside_the_field(capfd):
    def chatty(t, y, args):
        jax.debug.print("at {t}", t=t)
        y = eqx.error_if(y, jnp.any(y > 2.0), "y is above 2")
        return field(t, y, args)

    def gradient(vector_field):
        options = dict(vector_field=vector_field, solver=dfx.Heun(), stepsize_controller=CONSTANT)
        one = lambda y: weigh(solve(y, (PARAMS, 1.0), **options).ys)
        return jax.jit(jax.grad(lambda ys: jnp.sum(jax.vmap(one)(ys))))

    got = gradient(chatty)(YS)
    jax.effects_barrier()
    assert "at 0.0" in capfd.readouterr().out
    assert relative(got, gradient(field)(YS)) < 1e-12
    with pytest.raises(RuntimeError, match="y is above 2"):
        jax.block_until_ready(gradient(chatty)(3.0 * YS))
        jax.effects_barrier()
