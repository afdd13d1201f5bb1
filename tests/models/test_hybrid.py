"""`HybridODE` and its parameters, against closed forms."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nde
from nde.hybrid import Bounded, Frozen, Positive

TIGHT = {"stepsize_controller": diffrax.PIDController(rtol=1e-9, atol=1e-9)}
TS = jnp.linspace(0.0, 2.0, 9)


def logistic(t, y, p):
    return p["rate"] * y * (1 - y / p["capacity"])


def exact(y0, rate, capacity):
    return capacity / (1 + (capacity / y0 - 1) * np.exp(-rate * np.asarray(TS)))[:, None]


@pytest.mark.parametrize("rate", [1.5, Positive(1.5), Bounded(1.5, 1.0, 3.0), Frozen(1.5)])
def test_the_known_equations_see_physical_values(rate):
    model = nde.HybridODE(logistic, None, {"rate": rate, "capacity": 2.0}, **TIGHT)
    assert float(model.physical_parameters()["rate"]) == pytest.approx(1.5, abs=1e-14)
    np.testing.assert_allclose(model(TS, jnp.array([0.3])), exact(0.3, 1.5, 2.0), atol=1e-8)


@pytest.mark.parametrize(
    "parameter, slope",
    [
        (1.5, 1.0),
        (Positive(1.5), 1.5),  # d exp(u) / du
        (Bounded(1.5, 1.0, 3.0), 2.0 * 0.25 * 0.75),  # (high - low) s (1 - s)
        (Frozen(1.5), 0.0),
    ],
)
def test_gradients_pass_through_the_coordinates(parameter, slope):
    model = nde.HybridODE(logistic, None, {"rate": parameter, "capacity": Frozen(2.0)})
    grads = eqx.filter_grad(lambda m: m.physical_parameters()["rate"])(model)
    np.testing.assert_allclose(jax.tree.leaves(grads.parameters["rate"]), [slope], rtol=1e-12)


def test_a_network_that_starts_at_zero_starts_at_the_known_model():
    network = nde.fields.MLPField(1, 8, 1, last_layer_scale=0.0, key=jax.random.key(0))
    parameters = {"rate": Positive(1.5), "capacity": 2.0}
    known = nde.HybridODE(logistic, None, parameters, **TIGHT)
    hybrid = nde.HybridODE(logistic, network, parameters, **TIGHT)
    y0 = jnp.array([0.3])
    np.testing.assert_allclose(hybrid(TS, y0), known(TS, y0), rtol=1e-12)


def test_known_and_network_add_up():
    model = nde.HybridODE(
        lambda t, y, p: -p * y, lambda t, y, args: args * jnp.ones_like(y), 0.5, **TIGHT
    )
    ys = model(TS, jnp.array([3.0]), jnp.asarray(2.0))  # dy/dt = -y/2 + 2
    np.testing.assert_allclose(ys[:, 0], 4 - np.exp(-np.asarray(TS) / 2), atol=1e-8)


def test_combine_puts_the_network_inside_the_equations():
    def with_rate(known, network, t, y, p, args):
        return known(t, y, p | {"rate": network(t, y, args)[0]})

    model = nde.HybridODE(
        logistic, lambda t, y, args: jnp.array([1.5]), {"capacity": 2.0}, combine=with_rate, **TIGHT
    )
    np.testing.assert_allclose(model(TS, jnp.array([0.3])), exact(0.3, 1.5, 2.0), atol=1e-8)


def test_an_input_enters_the_known_equations_alone():
    def driven(known, network, t, y, p, path):
        return known(t, y, p) + path.evaluate(t)[1:]

    model = nde.HybridODE(lambda t, y, p: -p * y, None, 0.5, combine=driven, **TIGHT)
    path = nde.paths.linear(TS, jnp.full((len(TS), 1), 2.0))
    ys = model(TS, jnp.array([3.0]), path)  # dy/dt = -y/2 + 2
    np.testing.assert_allclose(ys[:, 0], 4 - np.exp(-np.asarray(TS) / 2), atol=1e-8)


def test_what_nothing_takes_is_refused():
    alone = nde.HybridODE(lambda t, y, p: -p * y, None, 0.5)
    with pytest.raises(ValueError, match="`args` was given, .* `combine`"):
        alone(TS, jnp.array([3.0]), jnp.array(2.0))
    calls = lambda known, network, t, y, p, args: network(t, y, args)
    with pytest.raises(ValueError, match="`combine` calls the network, but `network` is None"):
        nde.HybridODE(lambda t, y, p: -p * y, None, 0.5, combine=calls)(TS, jnp.array([3.0]))


def test_a_bound_is_a_number_whatever_it_was():
    """An array among the static fields cannot be compared, which jit does."""
    bounded = Bounded(1.5, jnp.asarray(1), np.float32(3.0))
    assert (bounded.low, bounded.high) == (1.0, 3.0)
    assert type(bounded.low) is type(bounded.high) is float


@pytest.mark.parametrize("value", [np.nextafter(0.0, 1.0), 1e-307, 1e-10, 0.5, 1 - 1e-15])
def test_a_parameter_that_is_accepted_is_given_back(value):
    """Next to a limit: either refused, or inside and trained."""
    for make in (Positive, lambda value: Bounded(value, 0.0, 1.0)):
        if value < np.finfo(float).tiny:
            with pytest.raises(ValueError, match="more than the rounding of float64"):
                make(value)
            continue
        parameter = make(value)
        np.testing.assert_allclose(parameter.value, value, rtol=1e-12)
        (slope,) = jax.tree.leaves(eqx.filter_grad(lambda p: p.value)(parameter))
        assert slope > 0


def test_fit_recovers_a_rate_and_leaves_the_frozen_one_alone():
    truth = exact(0.3, 1.5, 2.0)
    data = (TS[None], jnp.asarray(truth)[None])
    model = nde.HybridODE(logistic, None, {"rate": Positive(0.5), "capacity": Frozen(2.0)}, **TIGHT)
    fitted, _ = nde.fit(
        model,
        functools.partial(nde.losses.trajectory, error=nde.losses.log_mse),
        data,
        optim=optax.adam(0.1),
        steps=150,
        progress=False,
        key=jax.random.key(0),
    )
    values = fitted.physical_parameters()
    assert float(values["rate"]) == pytest.approx(1.5, abs=1e-3)
    assert float(values["capacity"]) == 2.0


def test_a_hybrid_is_batched_as_a_whole():
    """Alone, the known equations would take the parameters for those of the examples."""
    with pytest.raises(ValueError, match=r"NeuralODE\(nde.fields.Batched\(hybrid.vector_field\)\)"):
        nde.HybridODE(nde.fields.Batched(logistic), None, {"rate": 1.5, "capacity": 2.0})
    hybrid = nde.HybridODE(logistic, None, {"rate": Positive(1.5), "capacity": 2.0}, **TIGHT)
    y0s = jnp.array([[0.3], [0.6]])
    batched = nde.NeuralODE(nde.fields.Batched(hybrid.vector_field), **TIGHT)
    np.testing.assert_allclose(batched(TS, y0s)[:, 0], hybrid(TS, y0s[0]), atol=1e-8)
    grads = eqx.filter_grad(lambda m: m(TS, y0s).sum())(batched)
    assert all(np.all(g != 0) for g in jax.tree.leaves(grads))


def test_a_parameter_prints_its_value():
    assert repr(Positive(0.5)) == "Positive(0.5)"
    assert repr(Bounded(np.array([0.25, 0.5]), 0.0, 1.0)) == "Bounded([0.25 0.5 ])"
    assert repr(Frozen(9.81)) == "Frozen(9.81)"
    jax.jit(lambda p: repr(p) == "Positive(f64[])" or 1 / 0)(Positive(0.5))
