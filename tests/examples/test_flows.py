"""Trial runs of the examples of flows, and what their problems are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripts import load_example


@pytest.mark.parametrize(
    "methods",
    [
        ("optimal",),
        pytest.param(("likelihood", "independent"), marks=pytest.mark.slow),
    ],
)
def test_a_trial_run_of_the_moons(methods, tmp_path, monkeypatch, capsys):
    example = load_example("flow_moons")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example, "WIDTH", 16)
    results = example.main(plot=False, methods=methods, steps=30, points=64)
    assert tuple(results) == methods
    assert not list(tmp_path.iterdir())
    text = capsys.readouterr().out
    for row in results.values():
        assert f"{row['excess']:.3f}" in text and 0 < row["excess"] < 3 and row["nfe"] > 6
    assert ("memory of a gradient" in text) == ("likelihood" in methods)


def test_the_density_of_the_moons_is_that_of_their_points():
    example = load_example("flow_moons")
    line = np.linspace(-2.6, 4.0, 441)
    grid = jnp.asarray(np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2))
    density = np.exp(np.asarray(example.true_log_prob(grid)))
    assert abs(density.sum() * (line[1] - line[0]) ** 2 - 1) < 1e-6
    points = example.moons(4000, seed=1)
    entropy = -np.mean(np.asarray(example.true_log_prob(points)))
    assert abs(entropy - 0.947) < 0.04  # in the notes: 0.946 +- 0.005
    assert abs(np.std(np.asarray(points)) - 1) < 0.02


@pytest.mark.slow
def test_a_trial_run_of_the_digits(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    example = load_example("conditional_flow_digits")
    monkeypatch.chdir(tmp_path)
    found = example.main(steps=60, plot=False, width=32, per_class=2)
    assert not list(tmp_path.iterdir())
    assert found["recognised_real"] > 0.9 and 0 <= found["recognised"] <= 1
    assert 1.0 < found["bits"] < 20.0
    assert f"{found['bits']:.2f}" in capsys.readouterr().out
    levels = jnp.arange(17.0)[:, None] * jnp.ones((1, 64))
    points = example.to_points(levels, jax.random.key(0))
    np.testing.assert_array_equal(example.to_levels(points), levels)
