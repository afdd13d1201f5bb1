"""The gradient of a batched neural SDE beside its peers.

    python benchmarks/sde_gradient.py --out benchmarks/results/sde_gradient.json

Diagonal Stratonovich noise, drift and diffusion one small network each, the batch through `jax.vmap`,
loss mean(y1**2), gradient with respect to all weights, float32, fixed steps on [0, 1]. The hand-written
scans draw cell n from `fold_in(key, n)`, or read increments that were drawn before the clock started.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import measure

from nde.solvers import BrownianGrid, DiscreteAdjoint, ReversibleAdjoint, ReversibleHeun

ROUNDS = 7


class Case(NamedTuple):
    """One problem: state size, number of paths, steps on [0, 1], width of the networks."""

    state: int
    paths: int
    steps: int
    width: int


# Twice with fields that cost more than the noise, twice with cheap ones.
CASES = (
    Case(4, 256, 500, 32),
    Case(32, 128, 200, 64),
    Case(4, 256, 500, 8),
    Case(32, 128, 200, 16),
)


def networks(case: Case, key: jax.Array) -> tuple[eqx.nn.MLP, eqx.nn.MLP]:
    """Drift and diffusion: one hidden layer each, the diffusion bounded by tanh."""
    keys = jax.random.split(key)
    sizes = (case.state, case.state, case.width, 1)
    drift = eqx.nn.MLP(*sizes, activation=jax.nn.softplus, key=keys[0])
    final = dict(activation=jax.nn.softplus, final_activation=jnp.tanh)
    return drift, eqx.nn.MLP(*sizes, key=keys[1], **final)


def scan(scheme: str, stored: bool, case: Case) -> Callable:
    """A hand-written loop over the steps, differentiated by jax."""
    h = 1.0 / case.steps

    def noise(keys, n):
        draw = lambda key: jax.random.normal(jax.random.fold_in(key, n), (case.state,))
        return jnp.sqrt(h) * jax.vmap(draw)(keys)

    def loss(nets, y0, keys, table):
        drift, diffusion = (jax.vmap(net) for net in nets)
        increment = (lambda n: table[n]) if stored else (lambda n: noise(keys, n))

        def heun(y, n):
            dw = increment(n)
            k1 = h * drift(y) + diffusion(y) * dw
            k2 = h * drift(y + k1) + diffusion(y + k1) * dw
            return y + 0.5 * (k1 + k2), None

        def reversible(carry, n):
            y, z, f, g = carry
            dw = increment(n)
            z = 2 * y - z + h * f + g * dw
            f1, g1 = drift(z), diffusion(z)
            return (y + 0.5 * (h * (f + f1) + (g + g1) * dw), z, f1, g1), None

        if scheme == "Heun":
            y1, _ = jax.lax.scan(heun, y0, jnp.arange(case.steps))
        else:
            first = (y0, y0, drift(y0), diffusion(y0))
            (y1, *_), _ = jax.lax.scan(reversible, first, jnp.arange(case.steps))
        return jnp.mean(y1**2)

    return loss


def solve(solver: Any, adjoint: Any, path: str, case: Case) -> Callable:
    """`diffrax.diffeqsolve` for each path of the batch."""
    h = 1.0 / case.steps

    def loss(nets, y0, keys, table):
        del table
        drift, diffusion = nets
        sigma = lambda t, y, args: lx.DiagonalLinearOperator(diffusion(y))

        def one(y, key):
            if path == "grid":
                noise = BrownianGrid(0.0, 1.0, h, (case.state,), key)
            else:
                noise = diffrax.VirtualBrownianTree(0.0, 1.0, h / 2, (case.state,), key)
            ode = diffrax.ODETerm(lambda t, y, args: drift(y))
            terms = diffrax.MultiTerm(ode, diffrax.ControlTerm(sigma, noise))
            solution = diffrax.diffeqsolve(
                terms, solver, 0.0, 1.0, h, y, adjoint=adjoint, max_steps=case.steps + 1
            )
            return solution.ys[0]

        return jnp.mean(jax.vmap(one)(y0, keys) ** 2)

    return loss


def methods(case: Case) -> dict[str, Callable]:
    """Everything that is measured, by name; the scheme comes first."""
    stored, default = DiscreteAdjoint(), diffrax.RecursiveCheckpointAdjoint()
    heun, theirs, ours = diffrax.Heun(), diffrax.ReversibleHeun(), ReversibleHeun()
    return {
        "Heun, scan": scan("Heun", False, case),
        "Heun, scan, stored noise": scan("Heun", True, case),
        "Heun, ours, grid": solve(heun, stored, "grid", case),
        "Heun, diffrax, grid": solve(heun, default, "grid", case),
        "Heun, diffrax, tree": solve(heun, default, "tree", case),
        "reversible Heun, scan": scan("reversible Heun", False, case),
        "reversible Heun, ours, grid": solve(ours, ReversibleAdjoint(), "grid", case),
        "reversible Heun, diffrax, tree": solve(theirs, default, "tree", case),
    }


def torch_seconds(case: Case, seed: int, rounds: int) -> list[float] | None:
    """Seconds of torchsde's reversible Heun with its adjoint, if torchsde is installed."""
    try:
        import torch
        import torchsde
    except ImportError:
        return None
    torch.manual_seed(seed)
    layers = lambda *last: torch.nn.Sequential(
        torch.nn.Linear(case.state, case.width), torch.nn.Softplus(),
        torch.nn.Linear(case.width, case.state), *last,
    )  # fmt: skip

    class SDE(torch.nn.Module):
        noise_type, sde_type = "diagonal", "stratonovich"

        def __init__(self):
            super().__init__()
            self.drift, self.diffusion = layers(), layers(torch.nn.Tanh())

        def f(self, t, y):
            return self.drift(y)

        def g(self, t, y):
            return self.diffusion(y)

    sde, y0, ts = SDE(), torch.randn(case.paths, case.state), torch.tensor([0.0, 1.0])

    def step():
        options = dict(method="reversible_heun", adjoint_method="adjoint_reversible_heun")
        ys = torchsde.sdeint_adjoint(sde, y0, ts, dt=1.0 / case.steps, **options)
        (ys[-1] ** 2).mean().backward()
        return jnp.zeros(())

    return measure.interleaved({"torchsde": step}, rounds)["torchsde"]


def measure_case(case: Case, rounds: int, seed: int) -> dict[str, Any]:
    """Times every method in turns, and states the claims."""
    key = jax.random.key(seed)
    nets, static = eqx.partition(networks(case, key), eqx.is_array)
    y0 = jax.random.normal(key, (case.paths, case.state))
    keys = jax.random.split(key, case.paths)
    table = jax.random.normal(key, (case.steps, case.paths, case.state)) * case.steps**-0.5
    calls, memory = {}, {}
    for name, loss in methods(case).items():
        closed = lambda nets, *rest, loss=loss: loss(eqx.combine(nets, static), *rest)
        compiled = jax.jit(jax.grad(closed)).lower(nets, y0, keys, table).compile()
        memory[name] = measure.temporary_megabytes(compiled)
        calls[name] = lambda compiled=compiled: compiled(nets, y0, keys, table)
    seconds = measure.interleaved(calls, rounds)
    same = {
        scheme: measure.relative_difference(
            calls[f"{scheme}, ours, grid"](), calls[f"{scheme}, scan"]()
        )
        for scheme in ("Heun", "reversible Heun")
    }
    claims = []
    for scheme in ("Heun", "reversible Heun"):
        ours = f"{scheme}, ours, grid"
        for peer, most in ((f"{scheme}, scan", 1.3), (f"{scheme}, diffrax, tree", 0.1)):
            value = measure.ratio(seconds, ours, peer)
            claims.append(measure.Claim(f"{ours} / {peer}", value, most))
    torch = torch_seconds(case, seed, rounds)
    if torch is not None:
        seconds["torchsde adjoint"] = torch
        ours = "reversible Heun, ours, grid"
        value = measure.ratio(seconds, ours, "torchsde adjoint")
        claims.append(measure.Claim(f"{ours} / torchsde adjoint", value, 1 / 3))
    return {
        "case": case._asdict(),
        "seconds": {name: sorted(values)[len(values) // 2] for name, values in seconds.items()},
        "temporary_megabytes": memory,
        "difference_to_scan": same,
        "claims": [claim.record() for claim in claims],
        "_claims": claims,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", help="state,paths,steps,width")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cases = [Case(*map(int, c.split(","))) for c in args.cases] if args.cases else CASES
    entries = []
    for case in cases:
        entry = measure_case(case, args.rounds, args.seed)
        rows = [
            (n, 1e3 * s, entry["temporary_megabytes"].get(n)) for n, s in entry["seconds"].items()
        ]
        print(f"\n{case}")
        print(measure.table(("method", "ms", "MB"), rows))
        for claim in entry.pop("_claims"):
            print(claim.line())
        entries.append(entry)
    if args.out:
        packages = ("jax", "diffrax", "equinox", "torch", "torchsde")
        measure.write(args.out, {"environment": measure.environment(packages), "cases": entries})


if __name__ == "__main__":
    main()
