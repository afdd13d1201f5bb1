"""The hybrid examples: their data, and a trial run of each script."""

import jax
import numpy as np
import pytest
from scripts import load_example


def test_the_outbreak_is_that_of_the_source():
    counts = "3 8 26 76 225 298 258 233 189 128 68 29 14 4"
    np.testing.assert_array_equal(
        load_example("school_flu").IN_BED, np.array(counts.split(), float)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["school_flu", "pendulum_friction", "theophylline", "kepler", "reactor", "heat_rod"]
    + ["universal_lotka_volterra"],
)
def test_a_trial_run_saves_one_picture(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    with jax.default_matmul_precision("highest"):
        results = load_example(name).main(steps=3)
    assert results
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.png"]
    assert str(tmp_path / f"{name}.png") in capsys.readouterr().out
