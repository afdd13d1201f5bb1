"""The main job: the pelts, the known rates, and a trial run of the whole script."""

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
from scripts import load_example

SOURCE = """1900 30 4, 1901 47.2 6.1, 1902 70.2 9.8, 1903 77.4 35.2, 1904 36.3 59.4, 1905 20.6 41.7,
1906 18.1 19, 1907 21.4 13, 1908 22 8.3, 1909 25.4 9.1, 1910 27.1 7.4, 1911 40.3 8, 1912 57 12.3,
1913 76.6 19.5, 1914 52.3 45.7, 1915 19.5 51.1, 1916 11.2 29.7, 1917 7.6 15.8, 1918 14.6 9.7,
1919 16.2 10.1, 1920 24.7 8.6"""
YEARS, *COLUMNS = np.array([row.split() for row in SOURCE.split(",")], dtype=float).T
PELTS = np.stack(COLUMNS, axis=1)


@pytest.fixture(scope="module")
def example():
    return load_example("lynx_hare")


def test_the_pelts_are_those_of_the_source(example):
    np.testing.assert_array_equal(example.PELTS, PELTS)
    np.testing.assert_array_equal(example.YEARS, YEARS)


def naive_fit():
    """The same least squares by SciPy: rates, and mean squared error of the logarithms."""

    def residuals(x):
        birth, predation, conversion, death = np.exp(x[:4])
        logs = scipy.integrate.solve_ivp(
            lambda t, y: [birth - predation * np.exp(y[1]), conversion * np.exp(y[0]) - death],
            (0, 20),
            x[4:],
            t_eval=np.arange(21),
            rtol=1e-8,
            atol=1e-8,
        ).y.T
        return (logs - np.log(PELTS)).ravel()

    start = np.concatenate([np.log([0.5, 0.02, 0.02, 0.5]), np.log(PELTS[0])])
    found = scipy.optimize.least_squares(residuals, start)
    return np.exp(found.x[:4]), np.mean(found.fun**2)


def test_all_years_give_the_rates_of_least_squares(example):
    runs = example.train(example.mechanistic, years=21, steps=800, rate=5e-2, starts=4, seed=0)
    (ode, _), history = runs[0]
    rates = [float(ode.physical_parameters()[name]) for name in example.RATES]
    expected, error = naive_fit()
    np.testing.assert_allclose(rates, expected, rtol=5e-3)
    np.testing.assert_allclose(history.final_loss, error, rtol=1e-3)
    # Fits of these data by others, with priors: about 0.55, 0.028, 0.024 and 0.80.
    np.testing.assert_allclose(rates, [0.55, 0.028, 0.024, 0.80], rtol=0.04)


def test_a_trial_run_reports_every_model_and_saves_one_picture(
    example, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    results = example.main(steps=5)
    assert list(results) == ["Lotka-Volterra", "neural ODE", "hybrid"]
    assert [path.name for path in tmp_path.iterdir()] == ["lynx_hare.png"]
    table = capsys.readouterr().out
    assert str(tmp_path / "lynx_hare.png") in table
    for name, row in results.items():
        line = next(line for line in table.splitlines() if line.startswith(name))
        assert f"{row['train']:.3f}" in line and f"{row['forecast']:.3f}" in line
        assert row["lowest"] <= row["forecast"] <= row["highest"]
