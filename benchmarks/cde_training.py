"""Time to accuracy of a neural CDE beside torchcde, on the spirals of `examples/cde_spirals.py`.

The same series, network, first weights, order of the batches, optimizer and clipping. After every ten
steps both are judged on the same test series; the clock stands still meanwhile, and a run ends when the
accuracy wanted is reached twice in a row.

    ours        as in the example: the knots of each series, a step of Heun per knot
    torchcde    one grid for all, missing points as NaN; `midpoint`, a step per grid point (as many
                evaluations as Heun), without its adjoint, which is the faster way here

Seconds are given without compilation and, for ours, with it. torch compiles nothing.

    python benchmarks/cde_training.py --out benchmarks/results/cde_training.json
    python benchmarks/cde_training.py --quick
    python benchmarks/cde_training.py --dropped 0.3 --seeds 5
"""

import argparse
import functools as ft
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import measure
import numpy as np
import optax
from cde import torch_field, torch_linear
from regularizers import load

from nde.train import Batch

BATCH, TRAIN, TARGET = 32, 256, 0.5
RATE, CLIP = 1e-2, 1.0


class Case(NamedTuple):
    """What is learned, and when a run ends."""

    dropped: float
    seed: int
    wanted: float
    steps: int


def order(case: Case) -> np.ndarray:
    """The examples of every batch, shape (steps, batch)."""
    rng = np.random.default_rng(case.seed)
    epochs = case.steps * BATCH // TRAIN + 1
    return np.concatenate([rng.permutation(TRAIN) for _ in range(epochs)])[
        : case.steps * BATCH
    ].reshape(case.steps, BATCH)


def follow(case: Case, step: Callable[[np.ndarray], Any], accuracy: Callable[[], float]):
    """Runs steps until the accuracy is reached: seconds of the steps, their number, accuracy."""
    seconds, good, found = 0.0, 0, 0.0
    for n, rows in enumerate(order(case), start=1):
        began = time.perf_counter()
        step(rows)
        seconds += time.perf_counter() - began
        if n % 10 == 0:
            found = accuracy()
            good = good + 1 if found >= case.wanted else 0
            if good == 2:
                break
    return {"seconds": seconds, "steps": n, "accuracy": found}


def run_ours(case: Case) -> dict[str, float]:
    """Training by a compiled step."""
    example = load("cde_spirals")
    rng = np.random.default_rng(case.seed)
    known, unseen = (example.spirals(TRAIN, case.dropped, rng) for _ in range(2))
    params, static = eqx.partition(
        example.make_model(jax.random.key(case.seed)), eqx.is_inexact_array
    )
    optim = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(RATE))

    @jax.jit
    def train(params, state, known, rows):
        data = jax.tree.map(lambda leaf: leaf[rows], known)
        batch = Batch(data, jnp.ones(BATCH, bool), jnp.asarray(0))
        value = lambda p: example.loss(eqx.combine(p, static), batch, None)[0]
        updates, state = optim.update(jax.grad(value)(params), state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def judge(params):
        controls, labels = unseen
        logits = jax.vmap(eqx.combine(params, static))(controls)
        return jnp.mean((logits > 0) == (labels > 0.5))

    carry = [params, optim.init(params)]

    def step(rows):
        carry[:] = jax.block_until_ready(train(*carry, known, rows))

    began = time.perf_counter()
    jax.block_until_ready(train(*carry, known, order(case)[0]))
    compiling = time.perf_counter() - began
    result = follow(case, step, lambda: float(judge(carry[0])))
    return result | {"seconds with compilation": result["seconds"] + compiling}


def run_torch(case: Case) -> dict[str, float]:
    """The same with torchcde."""
    import torch
    import torchcde

    example = load("cde_spirals")
    rng = np.random.default_rng(case.seed)
    model = example.make_model(jax.random.key(case.seed))
    first, last = map(torch_linear, model.initial.layers)
    initial = torch.nn.Sequential(first, torch.nn.ReLU(), last)
    field, readout = torch_field(model), torch_linear(model.readout)
    parameters = [*field.parameters(), *initial.parameters(), *readout.parameters()]
    optim = torch.optim.Adam(parameters, lr=RATE)

    def data():
        ts, ys, seen, labels = example.observed(TRAIN, case.dropped, rng)
        ys = np.where(seen[:, :, None], ys, np.nan)
        values = np.concatenate([np.broadcast_to(ts[:, None], (*ys.shape[:2], 1)), ys], axis=2)
        knots = torch.tensor(ts, dtype=torch.float32)
        make = torchcde.hermite_cubic_coefficients_with_backward_differences
        return (
            knots,
            make(torch.tensor(values, dtype=torch.float32), knots),
            torch.tensor(labels).float(),
        )

    (knots, coefficients, labels), (_, unseen, answers) = data(), data()
    how = {"method": "midpoint", "options": {"step_size": float(knots[1] - knots[0])}}

    def logits(coefficients):
        path = torchcde.CubicSpline(coefficients, knots)
        z0 = initial(path.evaluate(path.interval[0]))
        states = torchcde.cdeint(path, field, z0, path.interval, adjoint=False, **how)
        return readout(states[:, -1])[:, 0]

    def step(rows):
        optim.zero_grad()
        entropy = torch.nn.functional.binary_cross_entropy_with_logits
        entropy(logits(coefficients[rows]), labels[rows]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optim.step()

    @torch.no_grad()
    def accuracy():
        return float(((logits(unseen) > 0) == (answers > 0.5)).float().mean())

    return follow(case, step, accuracy)


RUNS = {"ours": run_ours, "torchcde": run_torch}


def run_case(dropped: float, seeds: int, wanted: float, steps: int) -> dict[str, Any]:
    """Both, for several seeds, a fresh process each."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    for seed in range(seeds):
        for name in list(RUNS)[:: 1 if seed % 2 else -1]:
            case = Case(dropped, seed, wanted, steps)
            runs[name].append(measure.in_fresh_process(RUNS[name], case))
            print(f"{dropped:.0%} dropped, seed {seed}, {name}: {runs[name][-1]}", flush=True)
    ratio = statistics.median(
        a["seconds"] / b["seconds"] for a, b in zip(runs["ours"], runs["torchcde"], strict=True)
    )
    claim = measure.Claim(f"seconds to accuracy / torchcde, {dropped:.0%} dropped", ratio, TARGET)
    print(claim.line(), flush=True)
    return {"dropped": dropped, "wanted": wanted, "runs": runs, "claims": [claim.record()]}


def main() -> None:
    """Runs the cases asked for, and saves them if `--out` is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dropped", nargs="+", type=float, default=[0.0, 0.7])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--wanted", type=float, default=0.98, help="accuracy on the test series")
    parser.add_argument("--quick", action="store_true", help="few steps: does it run at all?")
    parser.add_argument("--out", type=Path, help="where to save the results (JSON)")
    options = parser.parse_args()
    seeds, steps = (1, 10) if options.quick else (options.seeds, 400)
    run = ft.partial(run_case, seeds=seeds, wanted=options.wanted, steps=steps)
    packages = ["nde", "jax", "jaxlib", "diffrax", "equinox", "torch", "torchcde"]
    report = {
        "environment": measure.environment(packages),
        "cases": [run(dropped) for dropped in options.dropped],
    }
    if options.out is not None:
        measure.write(options.out, report)


if __name__ == "__main__":
    main()
