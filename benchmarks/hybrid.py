"""Hybrid physics: how often training succeeds, and what structure buys.

    python benchmarks/hybrid.py --out benchmarks/results/hybrid.json
    python benchmarks/hybrid.py --quick

Three parts:

    periods        Lotka-Volterra over ten periods with 2 % noise, its four rates from a random start (a
                   factor of e^(.7 N) each): the share of seeds whose rates end within 5 %, by Adam on the
                   whole series, on a growing horizon, and by multiple shooting
    least_squares  the same rates over two periods from the same starts, by Levenberg-Marquardt and by Adam
                   on a growing horizon: how often the first ends at the second's error, and then its
                   seconds (the median: the first seed compiles)
    energy         a pendulum measured with noise .1: a plain neural ODE and a Hamiltonian one, trained
                   through the solve on windows of one period; error of the true energy over 20 periods
"""

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax

import nde
from nde.hybrid import Positive
from nde.inference import least_squares
from nde.losses import growing_horizon, mse, shooting, shooting_nodes

RATES = {"birth": 1.5, "predation": 1.0, "conversion": 1.0, "death": 1.5}
PERIOD = 4.4  # of the orbit through START
START = np.log([1.5, 0.8])
RIGHT = 0.05  # error of rates that counts as a success
WITHIN = 0.7  # spread of the logarithms of the guesses
SOLVE: dict[str, Any] = {"stepsize_controller": diffrax.PIDController(rtol=1e-5, atol=1e-7)}


def populations(t, y, rates):
    """Rates of change of the logarithms of prey and predators."""
    prey, predators = jnp.exp(y)
    growth = rates["birth"] - rates["predation"] * predators
    return jnp.stack([growth, rates["conversion"] * prey - rates["death"]])


def lotka_volterra(rates: dict[str, Any]) -> nde.HybridODE:
    """The model with these rates, all to be learned."""
    positive = {name: Positive(float(value)) for name, value in rates.items()}
    return nde.HybridODE(populations, None, positive, **SOLVE)


def series(periods: float, seed: int) -> tuple[jax.Array, jax.Array]:
    """Ten noisy observations a period, of the logarithms."""
    ts = jnp.linspace(0.0, periods * PERIOD, round(10 * periods) + 1)
    ys = lotka_volterra(RATES)(ts, jnp.asarray(START))
    return ts, ys + 0.02 * jax.random.normal(jax.random.key(seed), ys.shape)


def guess(seed: int) -> nde.HybridODE:
    """Rates of the right order of magnitude."""
    spread = np.exp(WITHIN * np.random.default_rng(seed).normal(size=len(RATES)))
    return lotka_volterra({n: v * s for (n, v), s in zip(RATES.items(), spread, strict=True)})


def rate_error(model: nde.HybridODE) -> float:
    """The largest relative error of the four rates."""
    found = model.physical_parameters()
    return max(abs(float(found[name]) / RATES[name] - 1) for name in RATES)


def on_horizon(model, batch, key, *, share: Callable):
    """Squared error on a beginning of the series; the initial state is trained too."""
    (ode, y0), (ts, ys) = model, batch.data
    ts, seen = growing_horizon(ts[0], share(batch.step))
    return mse(ode.solve(ts, y0, throw=False).ys, ys[0], seen), {}


def adam(steps: int, rate: float = 0.05) -> optax.GradientTransformation:
    """Clipped, with a rate that decays to nothing."""
    schedule = optax.cosine_decay_schedule(rate, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def fit(start: Any, loss: Callable, data: tuple, steps: int) -> Any:
    """The trained model."""
    options: dict[str, Any] = {"progress": False, "key": jax.random.key(0)}
    return nde.fit(start, loss, data, optim=adam(steps), steps=steps, **options)[0]


def whole(step):
    """All of the series from the beginning."""
    return jnp.ones_like(step, dtype=float)


def periods(seeds: int, steps: int) -> dict[str, Any]:
    """The share of seeds that find the rates, by the way they are trained."""
    grown = optax.linear_schedule(0.05, 1.0, 2 * steps // 3)
    losses = {
        "adam": functools.partial(on_horizon, share=whole),
        "growing horizon": functools.partial(on_horizon, share=grown),
        "shooting": functools.partial(
            shooting, segments=20, continuity=optax.linear_schedule(0.1, 3.0, steps)
        ),
    }
    errors: dict[str, list[float]] = {name: [] for name in losses}
    for seed in range(seeds):
        ts, ys = series(10, seed)
        data = (ts[None], ys[None])
        for name, loss in losses.items():
            extra = shooting_nodes(*data, 20) if name == "shooting" else ys[0]
            model, _ = fit((guess(seed), extra), loss, data, steps)
            errors[name].append(rate_error(model))
    share = {name: float(np.mean(np.array(e) < RIGHT)) for name, e in errors.items()}
    claims = [
        measure.Claim(f"failure rate, {name}", 1 - share[name], 0.1)
        for name in ("growing horizon", "shooting")
    ]
    return {"what": "periods", "success": share, "errors": errors, "steps": steps} | {
        "claims": [claim._asdict() for claim in claims]
    }


def of_series(model, data):
    """Residuals of one series."""
    (ode, y0), (ts, ys) = model, data
    return ode.solve(ts, y0, throw=False).ys - ys


def by_least_squares(seeds: int, steps: int) -> dict[str, Any]:
    """Seconds and errors of both, seed by seed; the first includes compiling."""
    grown = functools.partial(on_horizon, share=optax.linear_schedule(0.2, 1.0, steps // 2))
    seconds: dict[str, list[float]] = {"least squares": [], "adam": []}
    errors: dict[str, list[float]] = {"least squares": [], "adam": []}
    for seed in range(seeds):
        ts, ys = series(2, seed)
        start = (guess(seed), ys[0])
        ways = {
            "least squares": lambda start=start, ts=ts, ys=ys: (
                least_squares(start, (ts, ys), of_series, noise=0.02).model
            ),
            "adam": lambda start=start, ts=ts, ys=ys: fit(
                start, grown, (ts[None], ys[None]), steps
            ),
        }
        for name, way in ways.items():
            begin = time.perf_counter()
            try:
                model = way()
            except RuntimeError:  # did not converge from there
                model = start
            seconds[name].append(time.perf_counter() - begin)
            errors[name].append(float(jnp.sqrt(jnp.mean(of_series(model, (ts, ys)) ** 2))))
    ratios = np.array(seconds["least squares"]) / np.array(seconds["adam"])
    same = np.array(errors["least squares"]) < 1.1 * np.array(errors["adam"])
    claims = [
        measure.Claim("least squares / adam, seconds", float(np.median(ratios[same])), 0.05),
        measure.Claim("least squares, share of starts that end elsewhere", 1 - same.mean(), None),
    ]
    return {"what": "least_squares", "seconds": seconds, "rms": errors, "steps": steps} | {
        "claims": [claim._asdict() for claim in claims]
    }


def swing(ts: jax.Array, y0: jax.Array) -> jax.Array:
    """The pendulum q'' = -sin q."""
    field = lambda t, y, args: jnp.stack([y[1], -jnp.sin(y[0])])
    control = diffrax.PIDController(rtol=1e-9, atol=1e-9)
    return nde.NeuralODE(field, stepsize_controller=control)(ts, y0)


def true_energy(ys: jax.Array) -> jax.Array:
    """p^2 / 2 - cos q."""
    return ys[..., 1] ** 2 / 2 - jnp.cos(ys[..., 0])


def plain_pendulum(key) -> Any:
    """A network that knows nothing."""
    return nde.NeuralODE(nde.fields.MLPField(2, 32, 2, key=key), **SOLVE)


def hamiltonian_pendulum(key) -> Any:
    """p^2 / 2 and a learned potential."""
    potential = nde.fields.ScalarField(1, 32, 2, key=key)
    energy = nde.mechanics.Separable(nde.mechanics.Quadratic(), potential)
    return nde.HamiltonianODE(energy, **SOLVE)


def as_vector(model, ts, y0):
    """A trajectory, shape (times, 2), from a start of shape (2,)."""
    if isinstance(model, nde.HamiltonianODE):
        solution = model.solve(ts, (y0[:1], y0[1:]), throw=False)
        return jnp.concatenate(solution.ys, axis=-1)
    return model.solve(ts, y0, throw=False).ys


def on_windows(model, batch, key):
    """Squared error; the state at the start of every window is trained too."""
    (ode, starts), (ts, ys) = model, batch.data
    return mse(jax.vmap(functools.partial(as_vector, ode))(ts, starts), ys), {}


def energy(seeds: int, steps: int) -> dict[str, Any]:
    """Mean square of the error of the true energy, 20 periods from a noise-free start."""
    errors: dict[str, list[float]] = {"plain": [], "hamiltonian": []}
    window = jnp.linspace(0.0, 2 * jnp.pi, 21)
    for seed in range(seeds):
        keys = jax.random.split(jax.random.key(seed), 4)
        angles = jax.random.uniform(keys[0], (25,), minval=0.3, maxval=2.0)
        starts = jnp.stack([angles, jnp.zeros(25)], axis=1)
        ts = jnp.tile(window, (25, 1))
        exact = jax.vmap(swing)(ts, starts)
        ys = exact + 0.1 * jax.random.normal(keys[1], exact.shape)
        rollout = jnp.linspace(0.0, 40 * jnp.pi, 401)
        for name, make in (("plain", plain_pendulum), ("hamiltonian", hamiltonian_pendulum)):
            model, _ = fit((make(keys[2]), ys[:, 0]), on_windows, (ts, ys), steps)
            paths = jax.vmap(functools.partial(as_vector, model, rollout))(starts[:5])
            off = true_energy(paths) - true_energy(starts[:5])[:, None]
            errors[name].append(float(jnp.mean(off**2)))
    ratios = np.array(errors["hamiltonian"]) / np.array(errors["plain"])
    claim = measure.Claim("hamiltonian / plain, energy", float(np.median(ratios)), 1 / 30)
    return {"what": "energy", "errors": errors, "steps": steps, "claims": [claim._asdict()]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=("periods", "least_squares", "energy"))
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: does it run?")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    quick = args.quick
    work = {
        "periods": lambda: periods(*((1, 10) if quick else (10, 1500))),
        "least_squares": lambda: by_least_squares(*((1, 10) if quick else (10, 1000))),
        "energy": lambda: energy(*((1, 3) if quick else (3, 500))),
    }
    packages = ("nde", "jax", "jaxlib", "diffrax", "optimistix")
    report: dict[str, Any] = {"environment": measure.environment(packages), "cases": []}
    for name in args.parts:
        report["cases"].append(measure.significant(work[name]()))
        print(report["cases"][-1])
        if args.out is not None:
            measure.write(args.out, report)


if __name__ == "__main__":
    main()
