"""Training step of a `LinearCDE`: the ways to take its recurrence, and `NeuralCDE` beside it.

The problem: a random walk with 3 channels, observed at equal times on [0, 1], one batch by
`jax.vmap`; loss mean(output^2) at the end of the series, gradient with respect to all weights,
float32. Every state has the same size.

    default        what `LinearCDE` does if nothing is said
    in_order       one matrix times vector per interval (what a CPU gets by default)
    in_chunks      chunks of the series side by side (what other devices get)
    NeuralCDE      a network with one hidden layer on a linear path, one step of `Euler` per
                   observation, the fewest evaluations there are, with `DiscreteAdjoint`

    python benchmarks/linear_cde.py --out benchmarks/results/linear_cde.json
    python benchmarks/linear_cde.py --quick
    python benchmarks/linear_cde.py --lengths 4096 --blocks 1 4 16 --batches 1 8 32
"""

import argparse
import functools as ft
import itertools
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import measure

import nde
from nde.cde import NeuralCDE
from nde.linear_cde import LinearCDE, in_chunks, in_order
from nde.solvers import DiscreteAdjoint

CHANNELS, OUT = 3, 10
OURS: dict[str, dict[str, Any]] = {
    "default": {},
    "in_order": {"recurrence": in_order},
    "in_chunks": {"recurrence": in_chunks},
}
PEER = "NeuralCDE"
# `NeuralCDE` takes at least 20 times as long, from this length on and up to this block.
TARGET, TARGET_LENGTH, TARGET_BLOCK = 1 / 20, 4096, 4


class Case(NamedTuple):
    """One problem and how it is measured. Plain data: it travels to other processes."""

    length: int
    block: int
    batch: int
    hidden: int
    width: int
    seed: int
    rounds: int

    @property
    def target(self) -> float | None:
        """What the ratio to the peer must not exceed."""
        long, small = self.length >= TARGET_LENGTH, self.block <= TARGET_BLOCK
        return TARGET if long and small else None


def data(case: Case) -> tuple[jax.Array, jax.Array]:
    """Times, shape (length,), and walks, shape (batch, length, channels)."""
    shape = (case.batch, case.length, CHANNELS)
    jumps = jax.random.normal(jax.random.key(case.seed), shape) / case.length**0.5
    return jnp.linspace(0.0, 1.0, case.length), jnp.cumsum(jumps, axis=1)


def neural(case: Case):
    """The peer: its size of state is that of the linear model."""
    keys = jax.random.split(jax.random.key(case.seed), 3)
    return NeuralCDE(
        nde.fields.MatrixField(case.hidden, CHANNELS + 1, case.width, 1, key=keys[0]),
        eqx.nn.Linear(CHANNELS + 1, case.hidden, key=keys[1]),
        eqx.nn.Linear(case.hidden, OUT, key=keys[2]),
        solver=diffrax.Euler(),
        steps_per_interval=1,
        adjoint=DiscreteAdjoint(),
    )


def linear(case: Case, name: str):
    """One layer, like the peer."""
    key = jax.random.key(case.seed)
    options = {"block": case.block, "depth": 1, **OURS[name]}
    return LinearCDE(CHANNELS, case.hidden, OUT, **options, key=key)


def compiled_gradient(case: Case, name: str):
    """The compiled gradient of one method and its arguments; not yet called."""
    model = neural(case) if name == PEER else linear(case, name)
    weights, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(weights, ts, ys):
        model = eqx.combine(weights, static)
        if name == PEER:
            outputs = jax.vmap(lambda y: model(nde.paths.linear(ts, y)))(ys)
        else:
            outputs = jax.vmap(model, in_axes=(None, 0))(ts, ys)
        return jnp.mean(outputs**2)

    arguments = (weights, *data(case))
    return jax.jit(jax.grad(loss)).lower(*arguments).compile(), arguments


def time_methods(case: Case) -> dict[str, Any]:
    """Times, memory and agreement of every method. In a fresh process."""
    methods = {name: compiled_gradient(case, name) for name in [*OURS, PEER]}
    calls = {name: ft.partial(call, *arguments) for name, (call, arguments) in methods.items()}
    seconds = measure.interleaved(calls, case.rounds)
    difference = measure.relative_difference(
        jax.tree.leaves(calls["in_chunks"]()), jax.tree.leaves(calls["in_order"]())
    )
    return {
        "methods": {
            name: {
                "step_ms": 1e3 * statistics.median(seconds[name]),
                "temporary_mb": measure.temporary_megabytes(call),
            }
            for name, (call, _) in methods.items()
        },
        "difference": difference,
        "seconds": seconds,
    }


def run_case(case: Case) -> dict[str, Any]:
    """Everything about one case, printed and returned."""
    timed = measure.in_fresh_process(time_methods, case)
    ratio = ft.partial(measure.ratio, timed["seconds"])
    claims = [
        measure.Claim("default / NeuralCDE", ratio("default", PEER), case.target),
        measure.Claim("in_order / NeuralCDE", ratio("in_order", PEER), case.target),
        measure.Claim("in_order / in_chunks", ratio("in_order", "in_chunks"), None),
        measure.Claim("gradients: in_chunks - in_order", timed["difference"], None),
    ]
    columns = ["step_ms", "temporary_mb"]
    rows = [[name, *(row[c] for c in columns)] for name, row in timed["methods"].items()]
    title = f"length {case.length}, block {case.block}, state {case.hidden}, batch {case.batch}"
    print(f"\n{title}\n{measure.table(['', *columns], rows)}", flush=True)
    print("\n".join(claim.line() for claim in claims), flush=True)
    return {
        "title": title,
        **case._asdict(),
        "methods": timed["methods"],
        "claims": [claim.record() for claim in claims],
    }


def main() -> None:
    """Runs the cases asked for, and saves them if `--out` is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 4096, 16384])
    parser.add_argument("--blocks", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--width", type=int, default=128, help="of the network of NeuralCDE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny and few: does it run at all?")
    parser.add_argument("--out", type=Path, help="where to save the results (JSON)")
    options = parser.parse_args()
    if options.quick:
        options.lengths, options.blocks, options.batches = [32], [2], [4]
        options.hidden, options.rounds = 8, 2
    sizes = (options.hidden, options.width, options.seed, options.rounds)
    problems = itertools.product(options.lengths, options.blocks, options.batches)
    cases = [Case(*problem, *sizes) for problem in problems]
    report = {
        "environment": measure.environment(["nde", "jax", "jaxlib", "diffrax", "equinox"]),
        "cases": [run_case(case) for case in cases],
    }
    if options.out is not None:
        measure.write(options.out, report)


if __name__ == "__main__":
    main()
