"""`NeuralCDE` beside matrix exponentials, SciPy and a step written by hand."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg

import nde
from nde import paths
from nde.cde import NeuralCDE
from nde.fields import MatrixField

RANDOM = np.random.default_rng(2)
TIMES = np.cumsum(RANDOM.uniform(0.05, 0.2, 9))
VALUES = RANDOM.normal(size=(9, 2))
GAPS = VALUES.copy()
GAPS[0, 1] = GAPS[3:5, 0] = GAPS[-1, 1] = np.nan
MATRICES = RANDOM.normal(size=(3, 4, 4)) / 3
Z0 = RANDOM.normal(size=4)
TIGHT = {
    "steps_per_interval": None,
    "solver": diffrax.Tsit5(),
    "stepsize_controller": diffrax.PIDController(rtol=1e-9, atol=1e-9),
}
REVERSIBLE = {"solver": nde.solvers.ReversibleHeun(), "adjoint": nde.solvers.ReversibleAdjoint()}


def linear_field(t, z, args):
    return jnp.einsum("cij,j->ic", jnp.asarray(MATRICES, dtype=z.dtype), z)


def start(x):
    return jnp.asarray(Z0, dtype=x.dtype)


def neural(key=0, layers=1, **options):
    keys = jax.random.split(jax.random.key(key), 2 * layers + 1)
    fields = [MatrixField(4, 3 if k == 0 else 4, 6, 1, key=keys[k]) for k in range(layers)]
    first = [eqx.nn.Linear(3 if k == 0 else 4, 4, key=keys[layers + k]) for k in range(layers)]
    readout = eqx.nn.Linear(4, 2, key=keys[-1])
    if layers == 1:
        fields, first = fields[0], first[0]
    return NeuralCDE(fields, first, readout, **options)


@eqx.filter_jit
def run(model, path):
    return model(path)


@eqx.filter_jit
def along(model, path, ts=None):
    return model.trajectory(path, ts)


@eqx.filter_jit
def make(ts, ys, length=None, interpolation=paths.hermite_cubic, **options):
    return interpolation(jnp.asarray(ts), jnp.asarray(ys), length, **options)


def test_straight_pieces_are_a_product_of_matrix_exponentials():
    path = make(TIMES, VALUES, interpolation=paths.linear)
    rows, states = np.column_stack([TIMES, VALUES]), [Z0]
    for step in np.diff(rows, axis=0):
        states.append(scipy.linalg.expm(np.einsum("c,cij->ij", step, MATRICES)) @ states[-1])
    model = NeuralCDE(linear_field, start, **TIGHT)
    np.testing.assert_allclose(along(model, path), np.stack(states), atol=1e-7)
    # A step that does not end where the derivative jumps sees the wrong piece.
    term = diffrax.ControlTerm(linear_field, path).to_ode()
    options = {"dt0": None, "stepsize_controller": diffrax.StepTo(path.ts[jnp.array([0, 3, 8])])}
    wrong = diffrax.diffeqsolve(term, diffrax.Tsit5(), path.t0, path.t1, y0=Z0, **options).ys[-1]
    assert np.abs(wrong - states[-1]).max() > 1e-3


def test_a_smooth_path_is_an_ode():
    path, model = make(TIMES, VALUES), NeuralCDE(linear_field, start, **TIGHT)
    rows = np.column_stack([TIMES, VALUES])
    slopes = np.diff(rows, axis=0) / np.diff(TIMES)[:, None]
    spline = scipy.interpolate.CubicHermiteSpline(TIMES, rows, np.append(slopes[:1], slopes, 0))
    slope = spline.derivative()
    expected = scipy.integrate.solve_ivp(
        lambda t, z: np.einsum("cij,c,j->i", MATRICES, slope(t), z),
        (TIMES[0], TIMES[-1]),
        Z0,
        t_eval=TIMES[[0, 3, 8]],
        rtol=1e-10,
        atol=1e-10,
    ).y.T
    found = along(model, path, jnp.asarray(TIMES[[0, 3, 8]]))
    np.testing.assert_allclose(found, expected, atol=1e-7)
    np.testing.assert_allclose(run(model, path), expected[-1], atol=1e-7)


@pytest.mark.parametrize("layers, steps", [(1, 1), (2, 2)])
def test_the_default_takes_steps_of_heun_from_knot_to_knot(layers, steps):
    model = neural(layers=layers, steps_per_interval=steps)
    path = make(TIMES, VALUES, interpolation=paths.linear)
    fields = model.vector_field if layers > 1 else [model.vector_field]
    first = model.initial if layers > 1 else [model.initial]

    def rate(zs, dx):
        rates = []
        for field, z in zip(fields, zs, strict=True):
            dx = field(None, z) @ dx
            rates.append(dx)
        return rates

    @jax.jit
    def step(zs, dx):
        k1 = rate(zs, dx)
        k2 = rate([z + k for z, k in zip(zs, k1, strict=True)], dx)
        return [z + (a + b) / 2 for z, a, b in zip(zs, k1, k2, strict=True)]

    rows = np.column_stack([TIMES, VALUES])
    zs, x = [], jnp.asarray(rows[0])
    for initial in first:
        x = initial(x)
        zs.append(x)
    outputs = [model.readout(zs[-1])]
    for dx in np.diff(rows, axis=0):
        for _ in range(steps):
            zs = step(zs, jnp.asarray(dx) / steps)
        outputs.append(model.readout(zs[-1]))
    np.testing.assert_allclose(along(model, path), jnp.stack(outputs), atol=1e-12)
    np.testing.assert_allclose(run(model, path), outputs[-1], atol=1e-12)


def total(model, path):
    return jnp.sum(jax.vmap(model)(path) ** 2)


def batch(interpolation=paths.linear):
    ts = jnp.asarray(np.stack([TIMES, TIMES + 0.1 * np.sin(TIMES), TIMES * 1.1]))
    ys = jnp.asarray(np.stack([VALUES, -VALUES, GAPS]))
    return jax.jit(jax.vmap(interpolation))(ts, ys)


LOOSE = diffrax.PIDController(rtol=1e-3, atol=1e-4)
ADAPTIVE = {"steps_per_interval": None, "solver": diffrax.Heun(), "stepsize_controller": LOOSE}


@pytest.mark.parametrize(
    "interpolation, options",
    [
        (paths.hermite_cubic, {}),
        pytest.param(paths.hermite_cubic, REVERSIBLE, marks=pytest.mark.slow),
        (paths.linear, ADAPTIVE),
    ],
    ids=["default", "reversible", "adaptive"],
)
def test_gradients_are_those_of_autodiff_through_the_steps(interpolation, options):
    model, control = neural(**options), batch(interpolation)
    peer = eqx.tree_at(lambda m: m.adjoint, model, diffrax.DirectAdjoint())
    if "adjoint" in options:  # the same solver without its own adjoint
        peer = neural(solver=diffrax.ReversibleHeun(), adjoint=diffrax.DirectAdjoint())
    value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(total))(model, control)
    expected, exact = eqx.filter_jit(eqx.filter_value_and_grad(total))(peer, control)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    leaves = [jax.tree.leaves(eqx.filter(g, eqx.is_array)) for g in (gradient, exact)]
    for a, b in zip(*leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)
        assert np.any(np.asarray(a) != 0)


def test_a_batch_shares_the_weights_and_their_gradient():
    control = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 4)[:11], batch())
    model = neural()
    batched = f"tensor<11x{4 * 3}x6xf64>"  # of the last layer's weights

    def text(model):
        return eqx.filter_jit(eqx.filter_grad(total)).lower(model, control).as_text()

    assert batched not in text(model)
    peer = eqx.tree_at(lambda m: m.adjoint, model, diffrax.RecursiveCheckpointAdjoint())
    assert batched in text(peer)


def test_padding_and_neighbors_change_no_output_and_no_gradient():
    series = [(TIMES, GAPS), (TIMES[:5], GAPS[:5])]
    ts, ys, mask, lengths = paths.pad_series(series)
    ts, ys = jnp.where(mask, ts, jnp.nan), jnp.where(mask[..., None], ys, 1e30)

    @eqx.filter_jit
    @eqx.filter_grad(has_aux=True)
    def slope(model, ts, ys, lengths):
        control = jax.vmap(paths.hermite_cubic)(ts, ys, lengths)
        outputs = jax.vmap(model)(control)
        return jnp.sum(outputs**2), (outputs, jax.vmap(model.trajectory)(control))

    model, gradients = neural(), []
    found, (ends, rows) = slope(model, ts, ys, lengths)
    for lane, (t, y) in enumerate(series):
        size = len(t)
        alone = jnp.asarray(t)[None], jnp.asarray(y)[None], jnp.asarray([size])
        gradient, (end, row) = slope(model, *alone)
        gradients.append(jax.tree.leaves(gradient))
        np.testing.assert_allclose(ends[lane], end[0], atol=1e-12)
        np.testing.assert_allclose(rows[lane, :size], row[0], atol=1e-12)
        for repeated in rows[lane, size:]:
            np.testing.assert_array_equal(repeated, rows[lane, size - 1])
    for a, *parts in zip(jax.tree.leaves(found), *gradients, strict=True):
        np.testing.assert_allclose(a, sum(parts), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("interpolation, layers", [(paths.rectilinear, 1), (paths.linear, 2)])
def test_one_observation_at_a_time_gives_the_states_of_the_whole_series(interpolation, layers):
    model = neural(layers=layers, steps_per_interval=2, causal=True)
    options = {"causal": True} if interpolation is paths.linear else {}
    whole = make(TIMES, GAPS, interpolation=interpolation, **options)
    expected = eqx.filter_jit(lambda path: model.solve(path, path.times).ys)(whole)
    stream = paths.Stream(jnp.asarray(TIMES[0]), jnp.asarray(GAPS[0]), interpolation=interpolation)
    z = model.initial_state(stream.start)

    @jax.jit
    def observe(stream, z, t, y):
        stream, piece = stream.append(t, y)
        return stream, model.continue_from(z, piece), piece

    np.testing.assert_allclose(z, expected[0], atol=1e-10)
    for t, y, state in zip(TIMES[1:], GAPS[1:], expected[1:], strict=True):
        stream, z, piece = observe(stream, z, t, y)
        np.testing.assert_allclose(z, state, atol=1e-10)
    np.testing.assert_allclose(model.read(z, piece), run(model, whole), atol=1e-10)


def test_without_a_time_channel_the_speed_does_not_matter_and_with_one_it_does():
    slow = TIMES[0] + 3 * (TIMES - TIMES[0]) ** 2 + TIMES
    keys = jax.random.split(jax.random.key(0), 2)
    blind = NeuralCDE(MatrixField(4, 2, 6, 1, key=keys[0]), eqx.nn.Linear(2, 4, key=keys[1]))
    options = {"interpolation": paths.linear}
    a, b = (run(blind, make(ts, VALUES, time=False, **options)) for ts in (TIMES, slow))
    np.testing.assert_allclose(a, b, atol=1e-12)
    a, b = (run(neural(), make(ts, VALUES, **options)) for ts in (TIMES, slow))
    assert np.abs(a - b).max() > 1e-2


def test_the_first_value_enters():
    a, b = (run(neural(), make(TIMES, ys)) for ys in (VALUES, VALUES + 1.0))
    assert np.abs(a - b).max() > 1e-2


def test_more_steps_converge_at_second_order():
    path = make(TIMES, VALUES, interpolation=paths.linear)
    exact = run(NeuralCDE(linear_field, start, **TIGHT), path)
    errors = [
        np.abs(run(NeuralCDE(linear_field, start, steps_per_interval=n), path) - exact).max()
        for n in (8, 16, 32, 64)
    ]
    order = -np.polyfit(np.log([8, 16, 32, 64]), np.log(errors), 1)[0]
    assert abs(order - 2) < 0.15


def test_the_solve_reports_its_steps_and_a_failure_is_a_value():
    path = make(TIMES, VALUES, interpolation=paths.linear)
    assert int(neural().solve(path).stats["num_steps"]) == 8
    assert int(neural(steps_per_interval=3).solve(path).stats["num_steps"]) == 24
    wild = NeuralCDE(lambda t, z, args: 1e3 * linear_field(t, z**3, args), start, **TIGHT)
    solution = wild.solve(path, throw=False)
    assert solution.result != diffrax.RESULTS.successful


def test_a_field_of_higher_precision_than_the_data_has_a_gradient():
    single = lambda tree: jax.tree.map(
        lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, tree
    )
    model = neural()
    model = eqx.tree_at(lambda m: (m.initial, m.readout), model, replace_fn=single)
    ts = jnp.linspace(0.0, 1.0, 5, dtype=jnp.float32)
    ys = jnp.stack([jnp.sin(3 * ts), ts**2], axis=1)

    def loss(model):
        with jax.numpy_dtype_promotion("standard"):
            out = model(nde.paths.linear(ts, ys))
        assert out.dtype == jnp.float32
        return jnp.sum(out**2)

    grads = jax.tree.leaves(eqx.filter_grad(loss)(model))
    exact = jax.tree.leaves(eqx.filter_grad(loss)(single(model)))
    for got, want in zip(grads, exact, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


def test_times_states_and_weights_share_the_higher_precision():
    path = make(TIMES.astype(np.float32), VALUES.astype(np.float32))
    model = jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_array(x) else x, neural())
    assert run(model, path).dtype == jnp.float32


def path_of(*options, **named):
    return lambda: make(TIMES, VALUES, *options, **named)


BAD_CALLS = {
    "channels": (neural, path_of(time=False), "`initial` cannot be applied to the first value"),
    "data for a path": (neural, lambda: jnp.asarray(VALUES), r"make a path of the data first"),
    "a batch of paths": (neural, batch, "Use jax.vmap over the batch"),
    "looks ahead": (lambda: neural(causal=True), path_of(), "looks ahead, but the model"),
    "field for other channels": (
        lambda: NeuralCDE(linear_field, start),
        path_of(counts=True),
        r"returned shape \(4, 3\).* 5 channels; return \(4, 5\)",
    ),
    "constant steps over jumps": (
        lambda: neural(
            steps_per_interval=None, stepsize_controller=diffrax.ConstantStepSize(), dt0=0.1
        ),
        path_of(interpolation=paths.linear),
        "jumps at its knots",
    ),
    "too few steps": (
        lambda: neural(steps_per_interval=None, max_steps=4),
        path_of(interpolation=paths.linear),
        "`max_steps` is 4 but a step ends at each of the 8 knots",
    ),
    "scalar state": (
        lambda: NeuralCDE(linear_field, lambda x: x[0]),
        path_of(),
        r"`initial` returned shape \(\)",
    ),
}


@pytest.mark.parametrize("model, path, message", BAD_CALLS.values(), ids=BAD_CALLS)
def test_calls_that_cannot_work(model, path, message):
    with pytest.raises(ValueError, match=message):
        model()(path())


def test_times_that_decrease():
    with pytest.raises(ValueError, match=r"`ts` decreases from 0.9 to 0.2.*ts\[::-1\]"):
        neural().trajectory(path_of()(), jnp.array([0.9, 0.2]))


FAR = [  # (interpolation, model, spacing of times near 1e14: 100 spacings there are 1.6)
    (paths.linear, {}, 0.5),
    (paths.rectilinear, {}, 1.0),
    (paths.hermite_cubic, {"steps_per_interval": 2}, 1.0),
    (paths.linear, ADAPTIVE, 0.5),
]


@pytest.mark.parametrize("interpolation, options, spacing", FAR)
def test_a_last_step_that_would_be_merged_with_the_one_before_is_refused(
    interpolation, options, spacing
):
    """There the solver would see what comes after the last step but one."""
    model = neural(**options)
    ts, ys = 1e14 + spacing * jnp.arange(4.0), jnp.ones((4, 2))
    path = interpolation(ts, ys)
    with pytest.raises(ValueError, match="The last step of the path is too short .* Subtract"):
        model(path)
    with pytest.raises(RuntimeError, match="The last step of the path is too short"):
        jax.jit(lambda ys: model(interpolation(ts, ys)))(ys)
    padded = interpolation(ts - ts[0], ys, jnp.array(3))
    assert jnp.isfinite(model(padded)).all()


def test_times_outside_the_data():
    for ts in ([0.0, 0.5], [0.5, 99.0]):
        with pytest.raises(ValueError, match="outside the data nothing drives the model"):
            neural().trajectory(path_of()(), jnp.asarray(ts))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps_per_interval": 0}, "`steps_per_interval` is 0"),
        ({"solver": diffrax.Tsit5}, r"write `Tsit5\(\)`"),
        ({"initial": [start, start]}, "1 layers but `initial` has 2"),
        ({"readout": 3}, "`readout` is 3"),
        ({"vector_field": lambda z: z}, "called as vector_field"),
    ],
)
def test_models_that_can_never_work(options, message):
    with pytest.raises(ValueError, match=message):
        NeuralCDE(**({"vector_field": linear_field, "initial": start} | options))
