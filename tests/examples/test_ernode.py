"""Trial runs of the examples of regularized dynamics, and what their problems are."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripts import load_example

from nde.train import Batch


def check_every_method(example, model, data, **options):
    """A loss and its metrics come out of every method, without a compilation."""
    batch = Batch(data, jnp.ones(len(data[0]), dtype=bool), jnp.asarray(0))
    for name, method in example.METHODS.items():
        loss = functools.partial(example.loss, method=method, **options)
        value, metrics = eqx.filter_eval_shape(loss, model, batch, jax.random.key(0))
        assert value.shape == () and {"failed", "penalty"} < set(metrics), name


def test_a_trial_run_of_digits_is_cheaper_with_a_strong_regularizer(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    example = load_example("ernode_digits")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example, "TOLERANCE", 1e-8)
    monkeypatch.setattr(example, "WIDTH", 16)
    monkeypatch.setitem(example.METHODS, "strong", (example.ERNODE, 100.0, 10.0))
    results = example.main(steps=44, plot=False, methods=("vanilla", "strong"))
    assert list(results) == ["vanilla", "strong"] and not list(tmp_path.iterdir())
    plain, cheap = results.values()
    assert plain["entropy"] < 0.8 * np.log(10) and cheap["entropy"] < np.log(10)
    assert plain["test"] > 0.7 and cheap["nfe"] < 0.8 * plain["nfe"]
    table = capsys.readouterr().out
    for row in results.values():
        assert f"{row['test']:.1%}" in table and f"{row['nfe']:.1f}" in table
    (images, labels), held = example.digits()
    assert images.shape == (1408, 64) and images.min() == 0 and images.max() == 1
    assert held[0].shape == (389, 64) and labels.max() == 9
    check_every_method(
        example, example.Classifier(jax.random.key(0)), (images[:4], labels[:4]), steps=10
    )


@pytest.mark.slow
def test_a_trial_run_of_the_latent_model_learns():
    example = load_example("ernode_latent")
    ts, xs = example.oscillators(64, 0)
    assert np.all(np.diff(ts, axis=1) > 0) and np.all(ts[:, 0] == 0)
    np.testing.assert_allclose(ts[:, -1], 1.0, rtol=1e-12)
    results = example.main(steps=200, methods=("ERNODE",))
    assert results["ERNODE"]["train"] < 0.9 * float(jnp.mean(xs**2))
    assert 0 < results["ERNODE"]["test"] < float(jnp.mean(xs**2)) and results["ERNODE"]["nfe"] > 10
    check_every_method(example, example.LatentODE(jax.random.key(0)), (ts[:4], xs[:4]), steps=10)


# Means and variances of u1 and u2 at t = k/29, from 600,000 paths by another program.
SPIRAL = {
    6: ([0.546, 1.863], [0.0569, 0.0221]),
    15: ([-1.658, 0.189], [0.0535, 0.561]),
    24: ([-0.293, -1.327], [0.978, 0.248]),
    29: ([0.572, -1.005], [0.916, 0.591]),
}


def test_the_spiral_has_its_known_moments(monkeypatch):
    example = load_example("ernsde_spiral")
    monkeypatch.setattr(example, "TS", np.linspace(0.0, 1.0, 30))
    means, variances = example.true_moments(20000, seed=1)
    for at, (mean, variance) in SPIRAL.items():
        np.testing.assert_allclose(means[at], mean, atol=0.01)
        np.testing.assert_allclose(variances[at], variance, atol=0.03)


@pytest.mark.slow
def test_paths_on_the_grids_end_with_the_moments_of_the_spiral():
    example = load_example("ernsde_spiral")
    drift = lambda cubes: jnp.array([[-0.1, -2.0], [2.0, -0.1]]) @ cubes
    model = eqx.tree_at(
        lambda model: (model.network, model.slope),
        example.NeuralSpiral(jax.random.key(0)),
        (drift, jnp.full(2, 0.2)),
    )
    for cells in (example.COARSE, example.FINE):
        ys, _, failed = example.simulate(model, jax.random.key(1), 4000, cells)
        assert failed == 0
        mean, variance = SPIRAL[29]
        np.testing.assert_allclose(ys[:, -1].mean(axis=0), mean, atol=0.04)
        np.testing.assert_allclose(ys[:, -1].var(axis=0), variance, atol=0.08)


def test_every_method_of_the_spiral_has_a_loss():
    example = load_example("ernsde_spiral")
    moments = tuple(jnp.zeros((1, len(example.TS), 2)) for _ in range(2))
    check_every_method(example, example.NeuralSpiral(jax.random.key(0)), moments, paths=4)


def test_every_noise_of_the_spiral_has_both_signs():
    example = load_example("ernsde_spiral")
    model = eqx.tree_at(
        lambda model: (model.network, model.offset),
        example.NeuralSpiral(jax.random.key(0)),
        (lambda cubes: jnp.zeros(2), jnp.ones(2)),
    )
    model = eqx.tree_at(lambda model: model.slope, model, jnp.zeros(2))
    ys, _, _ = example.simulate(model, jax.random.key(1), 8, example.COARSE)
    moved = np.asarray(ys[:, -1]) - np.asarray(example.START)
    np.testing.assert_allclose(moved[:4], -moved[4:], atol=1e-12)
    assert len(np.unique(np.round(np.abs(moved), 9))) == 8


@pytest.mark.slow
def test_a_trial_run_of_the_spiral_learns(tmp_path, monkeypatch, capsys):
    example = load_example("ernsde_spiral")
    monkeypatch.chdir(tmp_path)
    results = example.main(steps=60, plot=False, methods=("SRNSDE",), paths=32, judged=64)
    row = results["SRNSDE"]
    assert row["train"] < 1.5 and not list(tmp_path.iterdir())  # 4 at the start
    assert row["failed"] == 0 and row["nfe"] >= 4 * 32
    table = capsys.readouterr().out
    assert f"{row['nfe']:.1f}" in table and f"{row['variance']:.4f}" in table


@pytest.mark.slow
def test_a_strong_regularizer_makes_the_spiral_cheaper(monkeypatch):
    example = load_example("ernsde_spiral")
    monkeypatch.setitem(example.METHODS, "strong", (example.ERNSDE, 30.0))
    options = dict(steps=60, plot=False, paths=32, judged=256)
    results = example.main(methods=("vanilla", "strong"), **options)
    assert results["strong"]["nfe"] < 0.95 * results["vanilla"]["nfe"]
