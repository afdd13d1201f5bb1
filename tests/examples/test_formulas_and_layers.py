"""Trial runs of the examples of formulas and layers that solve, and what each rests on."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripts import load_example

from nde.solvers import DiscreteAdjoint


def load(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return load_example(name)


def test_formulas_of_a_saturating_reaction_are_found_from_raw_trajectories(monkeypatch, tmp_path):
    example = load("formula_from_data", monkeypatch, tmp_path)
    found = example.saturating(generations=30, seed=0)
    assert example.error(found.choose(), example.SATURATING) < 1e-2
    # The negative control: another saturating field is far away.
    other = example.symbolic.Field.parse(["v / (1.1 + v)", "x / (1.0 + x)"], ("x", "v"))
    assert example.error(other, example.SATURATING) > 1e-2


def test_a_trial_run_of_the_pendulum_reports_a_formula(monkeypatch, tmp_path):
    example = load("pendulum_formula", monkeypatch, tmp_path)
    results = example.main(steps=2, plot=False, generations=2)
    assert results["formula"] and np.isfinite(results["constants"]).all()
    assert not list(tmp_path.iterdir())


def test_a_trial_run_of_the_equilibrium_penalizes_the_jacobian(monkeypatch, tmp_path):
    example = load("equilibrium_digits", monkeypatch, tmp_path)
    results = example.main(steps=30, plot=False, weight=10.0)
    assert results["penalized"]["evaluations"] < results["plain"]["evaluations"]
    assert min(row["test"] for row in results.values()) > 0.5


def test_rates_of_the_toggle_switch_come_from_its_steady_states(monkeypatch, tmp_path):
    """Without noise the fit has the truth as its only minimum: its loss there is zero."""
    example = load("toggle_steady_state", monkeypatch, tmp_path)
    truth = example.make_model(example.TRUTH)
    found = jax.vmap(example.at_rest, in_axes=(None, 0))(truth, example.DOSES)
    assert bool(jnp.all(found.converged)) and float(jnp.max(found.stats["growth"])) < 0
    long = jax.vmap(lambda dose: truth(jnp.array([0.0, 80.0]), example.START, dose)[-1])
    np.testing.assert_allclose(found.value, long(example.DOSES), rtol=1e-5)
    results = example.main(steps=2, plot=False)
    assert set(results["rates"]) == set(example.TRUTH)


def test_a_trial_run_of_the_flow_compares_all_solvers(monkeypatch, tmp_path):
    example = load("hypersolver_flow", monkeypatch, tmp_path)
    results = example.main(steps=3, plot=False)
    assert list(results) == ["Euler", "Heun", "RK4", "HyperEuler", "HyperHeun"]
    assert list(results["RK4"]) == [4, 8, 16]
    assert (
        results["RK4"][16]["error"] < results["Heun"][16]["error"] < results["Euler"][16]["error"]
    )


def test_the_tableau_of_the_example_has_order_four(monkeypatch, tmp_path):
    example = load("hypersolver_flow", monkeypatch, tmp_path)

    def error(steps):
        found = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: y * jnp.cos(t)),
            example.RK4(),
            0.0,
            2.0,
            2 / steps,
            jnp.array(1.0),
            adjoint=DiscreteAdjoint(),
            max_steps=steps + 1,
        )
        return abs(float(found.ys[-1]) - np.exp(np.sin(2.0)))

    slope = np.log(error(8) / error(32)) / np.log(4)
    assert slope == pytest.approx(4, abs=0.2)
