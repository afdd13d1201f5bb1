"""What every public model promises, asked of each: one example in, and the same answers.

A new model is one row of `MODELS`.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import mentions

import nde
from nde._model import AbstractModel

TS = np.linspace(0.0, 1.0, 5)
KEY = jax.random.key(0)


class Case(NamedTuple):
    """How a model is made, and one example of its inputs in a floating type."""

    make: Callable
    inputs: Callable
    draws: bool = False  # whether it takes a key
    idle: str = r"\0"  # the parameters that no output depends on, such as the constant of an energy
    lines: int = 100  # of its repr, at most


def of_times(dtype):
    return jnp.asarray(TS, dtype), jnp.asarray([1.0, 0.5], dtype)


def of_halves(dtype):
    return jnp.asarray(TS, dtype), (jnp.asarray([1.0], dtype), jnp.asarray([0.5], dtype))


def of_path(dtype):
    return (nde.paths.hermite_cubic(*of_series(dtype)),)


def of_windows(dtype):
    return (nde.paths.log_signature(nde.paths.linear(*of_series(dtype)), window=2, depth=2),)


def of_series(dtype):
    ts = jnp.asarray(TS, dtype)
    return ts, jnp.stack([jnp.sin(3 * ts), jnp.cos(2 * ts)], axis=1)


def mlp():
    return nde.fields.MLPField(2, 4, 1, key=KEY)


def matrix():
    return nde.fields.MatrixField(3, 3, 4, 1, activation=jax.nn.silu, key=KEY)


def linear(size_in, size_out):
    return eqx.nn.Linear(size_in, size_out, key=jax.random.key(1))


def predator_prey(t, y, p):
    return jnp.stack([p["growth"] * y[0] - y[0] * y[1], y[0] * y[1] - p["death"] * y[1]])


def hybrid():
    parameters = {"growth": nde.hybrid.Positive(1.5), "death": 0.5}
    return nde.HybridODE(predator_prey, mlp(), parameters)


def second_order():
    field = nde.fields.MLPField(2, 4, 1, out_size=1, key=KEY)
    return nde.SecondOrderODE(nde.mechanics.OfPositionAndVelocity(field))


def hamiltonian():
    potential = nde.fields.ScalarField(1, 4, 1, key=KEY)
    kinetic = nde.mechanics.Quadratic(nde.hybrid.Positive(2.0))
    return nde.HamiltonianODE(nde.mechanics.Separable(kinetic, potential))


class Lagrangian(eqx.Module):
    network: nde.fields.ScalarField

    def __call__(self, t, q, v, args):
        return jnp.sum(v**2) / 2 + self.network(t, jnp.concatenate([q, v]))


def lagrangian():
    network = nde.fields.ScalarField(2, 4, 1, last_layer_scale=0.1, key=KEY)
    return nde.LagrangianODE(Lagrangian(network))


def port_hamiltonian():
    energy = nde.fields.ScalarField(2, 4, 1, key=KEY)
    return nde.PortHamiltonianODE(energy, jnp.eye(2, k=1), jnp.eye(2)[:, 1:])


def generator():
    return nde.NeuralSDE(
        linear(3, 2),
        mlp(),
        nde.fields.MatrixField(2, 3, 4, 1, key=KEY),
        linear(2, 2),
        initial_noise=3,
    )


def latent():
    posterior = nde.fields.MLPField(2, 4, 1, context=3, time=True, key=KEY)
    return nde.LatentSDE(
        nde.latent_sde.GRUEncoder(2, 4, 3, key=KEY),
        nde.latent_sde.PosteriorDrift(linear(3, 4), posterior),
        mlp(),
        nde.fields.OwnNoise(2, 3, least=0.1, most=1.0, key=KEY),
        linear(2, 2),
        nde.latent_sde.Gaussian(jnp.zeros(2), jnp.zeros(2)),
        observation_std=0.1,
    )


def latent_ode():
    return nde.LatentODE(
        nde.latent_ode.GRUEncoder(2, 4, 3, key=KEY),
        linear(3, 4),
        mlp(),
        linear(2, 2),
        nde.latent_ode.Gaussian(jnp.zeros(2), jnp.zeros(2)),
        observation_std=0.1,
    )


def recurrent():
    cell = nde.odernn.Cell(eqx.nn.GRUCell(4, 2, key=KEY))
    return nde.ODERNN(mlp(), cell, linear(2, 2), jnp.array([0.1, -0.2]))


def noisy():
    return nde.HybridSDE(
        lambda t, y, p, args: predator_prey(t, y, p) + p["net"](t, y),
        lambda t, y, p, args: p["noise"] * y,
        {"growth": nde.hybrid.Positive(1.5), "death": 0.5, "noise": 0.2, "net": mlp()},
        calculus="ito",
    )


MODELS = {
    "NeuralODE": Case(lambda: nde.NeuralODE(mlp()), of_times),
    "HybridODE": Case(hybrid, of_times),
    "SecondOrderODE": Case(second_order, of_halves),
    "HamiltonianODE": Case(hamiltonian, of_halves, idle=r"layers\[1\]\.bias$"),
    "LagrangianODE": Case(lagrangian, of_halves, idle=r"layers\[1\]\.bias$"),
    "PortHamiltonianODE": Case(port_hamiltonian, of_times, idle=r"layers\[1\]\.bias$"),
    "CNF": Case(lambda: nde.CNF(mlp(), nde.cnf.Normal(2)), of_times),
    "NeuralCDE": Case(lambda: nde.NeuralCDE(matrix(), linear(3, 3), linear(3, 2)), of_path),
    "LogNeuralCDE": Case(
        lambda: nde.LogNeuralCDE(matrix(), linear(3, 3), linear(3, 2)), of_windows
    ),
    "NeuralSDE": Case(generator, lambda dtype: (jnp.asarray(TS, dtype),), draws=True),
    "LatentSDE": Case(
        latent, of_series, draws=True, idle=r"^\.(prior|start|observation)", lines=150
    ),
    "LatentODE": Case(latent_ode, of_series, draws=True, idle=r"^\.(start|observation)", lines=150),
    "ODERNN": Case(recurrent, of_series),
    "HybridSDE": Case(noisy, of_times, draws=True),
    "LinearCDE": Case(lambda: nde.LinearCDE(2, 4, 2, key=KEY), of_series),
}
SOLVED = [name for name in MODELS if name != "LinearCDE"]  # a product, no solve


def cheap(model):
    """The model with few steps of a method that compiles quickly, where it has a choice."""
    if not isinstance(model.solver, diffrax.Tsit5):
        return model
    numerics = {
        "solver": diffrax.Heun(),
        "stepsize_controller": diffrax.ConstantStepSize(),
        "dt0": 0.25,
    }
    return type(model)(**({f: getattr(model, f) for f in model.__dataclass_fields__} | numerics))


def options(case):
    return {"key": jax.random.key(2)} if case.draws else {}


def test_every_public_model_is_asked():
    public = [getattr(nde, name) for name in nde.__all__]
    models = {
        x.__name__
        for x in public
        if isinstance(x, type) and issubclass(x, AbstractModel | nde.LinearCDE)
    }
    assert models == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_a_function_of_one_example(name):
    """Under `jit` and `vmap` it is the same function, and its gradient reaches every parameter."""
    case = MODELS[name]
    model, inputs = case.make(), case.inputs(jnp.float64)
    model = cheap(model) if name in SOLVED else model
    once = model(*inputs, **options(case))
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), inputs)

    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def squares(model, batch):
        outputs = jax.vmap(lambda *one: model(*one, **options(case)))(*batch)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(outputs)), outputs

    (_, outputs), grads = squares(model, batch)
    for alone, both in zip(jax.tree.leaves(once), jax.tree.leaves(outputs), strict=True):
        assert alone.dtype == jnp.float64 and np.isfinite(alone).all()
        np.testing.assert_allclose(both[0], alone, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(both[1], alone, rtol=1e-10, atol=1e-12)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all() and np.any(leaf != 0) == (not re.search(case.idle, name)), (
            name
        )


@pytest.mark.parametrize("name", MODELS)
def test_single_precision_stays(name):
    case = MODELS[name]
    model = jax.tree.map(
        lambda x: x.astype(jnp.float32) if eqx.is_inexact_array(x) else x, case.make()
    )
    output = eqx.filter_eval_shape(model, *case.inputs(jnp.float32), **options(case))
    assert {x.dtype for x in jax.tree.leaves(output)} == {np.dtype("float32")}


@pytest.mark.parametrize("name", SOLVED)
def test_a_solve_says_what_it_did(name):
    case = MODELS[name]
    solution = case.make().solve(*case.inputs(jnp.float64), **options(case), throw=False)
    assert solution.stats["nfe"] >= solution.stats["num_accepted_steps"] > 0
    assert bool(diffrax.is_okay(solution.result))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_from_a_file(name, tmp_path):
    case = MODELS[name]
    model, inputs = case.make(), case.inputs(jnp.float64)
    other = jax.tree.map(lambda x: x + 1 if eqx.is_inexact_array(x) else x, model)
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", model)
    loaded = eqx.tree_deserialise_leaves(tmp_path / "model.eqx", other)
    before, after = (m(*inputs, **options(case)) for m in (model, loaded))
    jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_prints_in_few_lines(name):
    assert len(repr(MODELS[name].make()).splitlines()) < MODELS[name].lines


MISTAKES = {
    "solver": (lambda m: {"solver": type(m.solver)}, ["`solver` is the class", "()`"]),
    "adjoint": (lambda m: {"adjoint": None}, ["`adjoint` is None", "AbstractAdjoint"]),
    "dt0": (lambda m: {"dt0": 0.0}, ["`dt0` is zero", "dt0=None"]),
    "max_steps": (lambda m: {"max_steps": 0}, ["`max_steps` is 0", ">= 1"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", SOLVED)
def test_the_same_mistake_has_the_same_words(name, mistake):
    model = MODELS[name].make()
    change, words = MISTAKES[mistake]
    parts = {f: getattr(model, f) for f in model.__dataclass_fields__}
    with pytest.raises(ValueError, match=mentions(words)):
        type(model)(**(parts | change(model)))
