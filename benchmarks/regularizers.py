"""What the regularizers of the dynamics cost in training, and what they save in prediction.

Three parts, on the problems of the examples `ernode_digits.py` and `ernsde_spiral.py`:

    digits    every method, several seeds: accuracies, seconds of training, NFE and time of prediction.
              Seconds of training are without compilation; within a seed the order of the methods is
              another one each time, and ratios to vanilla are taken within a seed
    step      one training step (loss, gradient, update), regularized and not, from the same trained
              model, hence with the same solver steps: the ratio, measured in turns
    spiral    the neural SDE, plain and with its estimates: largest errors of the moments on a fine
              grid, seconds of training, NFE and time of prediction

    python benchmarks/regularizers.py --out benchmarks/results/regularizers.json
    python benchmarks/regularizers.py --quick
    python benchmarks/regularizers.py --parts digits step --seeds 5
"""

import argparse
import functools as ft
import importlib.util
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import measure
import optax

from nde.train import Batch

EXAMPLES = Path(__file__).parents[1] / "examples"
PLAIN, OURS = "vanilla", "ERNODE"
NFE_TARGET, ACCURACY_TARGET, TRAINING_TARGET, STEP_TARGET = 0.8, 0.01, 1.1, 1.15
DIGITS_COLUMNS = ("train", "test", "seconds", "prediction_ms", "nfe")
SPIRAL_COLUMNS = ("train", "mean", "variance", "seconds", "prediction_ms", "nfe")
# The estimates of the solver itself; the target of a step is for them.
ESTIMATES = ("SRNODE", OURS)


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Mean, smallest and largest value of every column over the seeds."""
    return {
        name: {"mean": statistics.mean(column), "range": [min(column), max(column)]}
        for name in runs[0]
        for column in [[run[name] for run in runs]]
    }


def printed(title: str, rows: dict[str, dict[str, Any]], columns: tuple[str, ...]) -> None:
    """Means over the seeds."""
    cells = [[name, *(row[column]["mean"] for column in columns)] for name, row in rows.items()]
    print(f"\n{title}\n{measure.table(['', *columns], cells)}", flush=True)


def over_seeds(
    title: str, example: ModuleType, run: Callable, seeds: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """The rows of an example's methods, with times of training and prediction beside the plain one.

    `run(method, seed)` trains: it gives the example's report, and a call that predicts.
    """
    names, runs = list(example.METHODS), {name: [] for name in example.METHODS}
    for seed in range(seeds):
        shift, calls = seed * 2 % len(names), {}
        for name in names[shift:] + names[:shift]:
            report, calls[name] = run(example.METHODS[name], seed)
            runs[name].append(report)
        seconds = measure.interleaved({name: calls[name] for name in names}, rounds)
        for name in names:
            row = runs[name][-1]
            row["prediction_ms"] = 1e3 * statistics.median(seconds[name])
            row["prediction_ratio"] = measure.ratio(seconds, name, PLAIN)
            row["training_ratio"] = row["seconds"] / runs[PLAIN][-1]["seconds"]
        print(f"{title}, seed {seed}\n{example.table({n: runs[n][-1] for n in names})}", flush=True)
    return {name: summary(runs[name]) for name in names}


# Digits


def digits(seeds: int, steps: int, rounds: int) -> dict[str, Any]:
    """The table of the digits, and the targets."""
    example = load("ernode_digits")
    known, held = example.digits()

    def run(method, seed):
        trained = example.train(known, method, steps=steps, seed=seed)
        predict = ft.partial(example.predict, trained[0], held[0])
        return example.report(*trained, known, held), predict

    rows = over_seeds("digits", example, run, seeds, rounds)
    printed(f"digits, mean of {seeds} seeds", rows, DIGITS_COLUMNS)
    return {"steps": steps, "seeds": seeds, "methods": rows, "claims": digits_claims(rows)}


def digits_claims(rows: dict[str, dict[str, Any]]) -> list[measure.Claim]:
    """What ERNODE must reach; TayNODE's cost of training beside it."""
    mean = lambda name, column: rows[name][column]["mean"]
    nfe = mean(OURS, "nfe") / mean(PLAIN, "nfe")
    lost = mean(PLAIN, "test") - mean(OURS, "test")
    return [
        measure.Claim("digits: NFE, ERNODE / vanilla", nfe, NFE_TARGET),
        measure.Claim("digits: test accuracy lost by ERNODE", lost, ACCURACY_TARGET),
        measure.Claim(
            "digits: training time, ERNODE / vanilla", mean(OURS, "training_ratio"), TRAINING_TARGET
        ),
        measure.Claim(
            "digits: prediction time, ERNODE / vanilla", mean(OURS, "prediction_ratio"), None
        ),
        measure.Claim(
            "digits: training time, TayNODE / vanilla", mean("TayNODE", "training_ratio"), None
        ),
    ]


# One training step


def training_step(example: ModuleType, model: Any, method: Any, batch: Batch) -> Callable:
    """The compiled step of one method: `() -> (parameters, metrics)`."""
    params, static = eqx.partition(model, eqx.is_inexact_array)
    optim = optax.adam(1e-3)

    def value(params, batch, key):
        return example.loss(eqx.combine(params, static), batch, key, method=method, steps=1)

    def step(params, state, batch, key):
        (_, metrics), gradient = jax.value_and_grad(value, has_aux=True)(params, batch, key)
        updates, _ = optim.update(gradient, state, params)
        return optax.apply_updates(params, updates), metrics

    arguments = params, optim.init(params), batch, jax.random.key(0)
    return ft.partial(jax.jit(step).lower(*arguments).compile(), *arguments)


def step_times(steps: int, rounds: int) -> dict[str, Any]:
    """Time of a step of every method beside a plain one, from one trained model."""
    example = load("ernode_digits")
    known, _ = example.digits()
    model, _ = example.train(known, None, steps=steps, seed=0)
    data = jax.tree.map(lambda leaf: leaf[: example.BATCH], known)
    batch = Batch(data, jnp.ones(example.BATCH, dtype=bool), jnp.asarray(0))
    # The strengths of one regularizer are one program.
    methods = {n: m for n, m in example.METHODS.items() if not n.startswith(f"{OURS} ")}
    calls = {name: training_step(example, model, m, batch) for name, m in methods.items()}
    evaluations = {name: float(call()[1]["nfe"]) for name, call in calls.items()}
    seconds = measure.interleaved(calls, rounds)
    rows = {
        name: {
            "step_ms": 1e3 * statistics.median(seconds[name]),
            "ratio": measure.ratio(seconds, name, PLAIN),
            "nfe": evaluations[name],
        }
        for name in methods
    }
    columns = ("step_ms", "ratio", "nfe")
    cells = [[name, *(row[column] for column in columns)] for name, row in rows.items()]
    print(f"\none training step\n{measure.table(['', *columns], cells)}", flush=True)
    claims = [
        measure.Claim(f"step, {name} / vanilla", rows[name]["ratio"], STEP_TARGET)
        for name in ESTIMATES
    ]
    return {"rounds": rounds, "methods": rows, "claims": claims}


# Spiral


def spiral(seeds: int, steps: int, paths: int, judged: int, rounds: int) -> dict[str, Any]:
    """The table of the spiral: errors of the moments on the fine grid, NFE of adaptive paths."""
    example = load("ernsde_spiral")
    moments = example.true_moments(12 * judged, seed=0)

    def run(method, seed):
        trained = example.train(moments, method, steps=steps, paths=paths, seed=seed)
        at = (jax.random.key(seed), example.PREDICTED, None)
        predict = ft.partial(example.simulate, trained[0], *at)
        return example.report(*trained, moments, judged, seed), predict

    rows = over_seeds("spiral", example, run, seeds, rounds)
    printed(f"spiral, mean of {seeds} seeds", rows, SPIRAL_COLUMNS)
    claims = spiral_claims(rows)
    return {"steps": steps, "paths": paths, "seeds": seeds, "methods": rows, "claims": claims}


def spiral_claims(rows: dict[str, dict[str, Any]]) -> list[measure.Claim]:
    """ERNSDE needs fewer evaluations than a plain model, and both have the spiral's moments."""
    mean = lambda name, column: rows[name][column]["mean"]
    claims = [
        measure.Claim(
            f"spiral: NFE, {name} / vanilla", mean(name, "nfe") / mean(PLAIN, "nfe"), target
        )
        for name, target in (("ERNSDE", 0.95), ("ERNSDE 10", None), ("SRNSDE", None))
    ]
    for name in (PLAIN, "ERNSDE"):
        for column, target in (("mean", 0.05), ("variance", 0.1)):
            what = f"spiral: largest error of a {column}, {name}"
            claims.append(measure.Claim(what, mean(name, column), target))
    for what in ("training", "prediction"):
        value = mean("ERNSDE", f"{what}_ratio")
        claims.append(measure.Claim(f"spiral: {what} time, ERNSDE / vanilla", value, None))
    return claims


def main() -> None:
    """Runs the parts asked for, and saves them if `--out` is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=["step", "digits", "spiral"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny and few: does it run at all?")
    parser.add_argument("--out", type=Path, help="where to save the results (JSON)")
    options = parser.parse_args()
    seeds, quick = options.seeds, options.quick
    work = {
        "step": ft.partial(step_times, *((5, 3) if quick else (400, 61))),
        "digits": ft.partial(digits, *((1, 5, 3) if quick else (seeds, 600, 21))),
        "spiral": ft.partial(
            spiral, *((1, 3, 8, 20, 3) if quick else (seeds, 1000, 128, 32768, 11))
        ),
    }
    unknown = set(options.parts) - set(work)
    if unknown:
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(work)}")
    report: dict[str, Any] = {
        "environment": measure.environment(
            ["nde", "jax", "jaxlib", "diffrax", "equinox", "optax", "scikit-learn"]
        )
    }
    with tempfile.TemporaryDirectory() as cache:
        # Every seed runs the same programs; times are without compilation.
        jax.config.update("jax_compilation_cache_dir", cache)
        for name in options.parts:
            part = work[name]()
            print("\n".join(claim.line() for claim in part["claims"]), flush=True)
            report[name] = part | {"claims": [claim.record() for claim in part["claims"]]}
    if options.out is not None:
        measure.write(options.out, report)


if __name__ == "__main__":
    main()
