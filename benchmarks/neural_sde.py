"""Training steps of neural SDEs beside their peers: a generator, a latent SDE, a signature kernel.

    python benchmarks/neural_sde.py --out benchmarks/results/neural_sde.json

The loss and its gradient with respect to all weights, float32, one compiled call.

- generator: mean(Y(t1)^2) of paths of a `NeuralSDE` (general noise, 3 channels) on equal steps, beside
  diffrax (the same networks, its tree, its default adjoint) and torchsde (reversible Heun, its adjoint);
- latent SDE: the simulated and the matched bound of one batch;
- signature kernel: the gradient of a Gram matrix, beside autodiff of the plain sweep.

Peers that are not installed are left out. Memory is what XLA plans for a call besides its arguments.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import measure

import nde
from nde import losses
from nde.solvers import DiscreteAdjoint, ReversibleAdjoint, ReversibleHeun

ROUNDS = 5


class Case(NamedTuple):
    """Hidden size, width of the networks, paths and steps on [0, 1] of the generator."""

    hidden: int
    width: int
    paths: int
    steps: int


CASES = (Case(16, 16, 256, 64), Case(16, 16, 256, 512))
NOISE, START = 3, 5


def generator(case: Case, key: jax.Array, **options: Any) -> nde.NeuralSDE:
    """The model of the benchmark, in its default numerics or others."""
    keys = jax.random.split(key, 4)
    return nde.NeuralSDE(
        eqx.nn.MLP(START, case.hidden, case.width, 1, key=keys[0]),
        nde.fields.MLPField(case.hidden, case.width, 1, time=True, key=keys[1]),
        nde.fields.MatrixField(case.hidden, NOISE, case.width, 1, time=True, key=keys[2]),
        eqx.nn.Linear(case.hidden, 1, key=keys[3]),
        initial_noise=START,
        **options,
    )


def ours(case: Case, key: jax.Array, **options: Any) -> tuple[Any, Callable]:
    ts = jnp.linspace(0.0, 1.0, case.steps + 1)

    def loss(model, keys):
        return jnp.mean(jax.vmap(lambda key: model(ts, key=key)[-1])(keys) ** 2)

    return generator(case, key, **options), loss


def by_diffrax(case: Case, key: jax.Array, solver: Any) -> tuple[Any, Callable]:
    """The same networks, diffrax's tree of noise and its default adjoint."""
    h = 1.0 / case.steps

    def loss(model, keys):
        def one(key):
            start, noise = jax.random.split(key)
            x0 = model.initial(jax.random.normal(start, (START,)))
            tree = diffrax.VirtualBrownianTree(0.0, 1.0, h / 2, (NOISE,), noise)
            terms = diffrax.MultiTerm(
                diffrax.ODETerm(model.drift), diffrax.ControlTerm(model.diffusion, tree)
            )
            solution = diffrax.diffeqsolve(terms, solver, 0.0, 1.0, h, x0, max_steps=case.steps + 1)
            return model.readout(solution.ys[0])

        return jnp.mean(jax.vmap(one)(keys) ** 2)

    return generator(case, key), loss


def by_torchsde(case: Case, seed: int) -> Callable | None:
    """A call of torchsde's reversible Heun with its adjoint, if torchsde is installed."""
    try:
        import torch
        import torchsde
    except ImportError:
        return None
    torch.manual_seed(seed)

    def network(size_in: int, size_out: int, *last: Any) -> Any:
        hidden = torch.nn.Linear(size_in, case.width), torch.nn.Softplus()
        return torch.nn.Sequential(*hidden, torch.nn.Linear(case.width, size_out), *last)

    class SDE(torch.nn.Module):
        noise_type, sde_type = "general", "stratonovich"

        def __init__(self):
            super().__init__()
            self.drift = network(1 + case.hidden, case.hidden, torch.nn.Tanh())
            self.diffusion = network(1 + case.hidden, case.hidden * NOISE, torch.nn.Tanh())

        def both(self, t, y):
            return torch.cat([t.expand(y.shape[0], 1), y], dim=1)

        def f(self, t, y):
            return self.drift(self.both(t, y))

        def g(self, t, y):
            return self.diffusion(self.both(t, y)).view(-1, case.hidden, NOISE)

    sde, initial = SDE(), network(START, case.hidden)
    readout, ts = torch.nn.Linear(case.hidden, 1), torch.tensor([0.0, 1.0])

    def step():
        options = dict(method="reversible_heun", adjoint_method="adjoint_reversible_heun")
        y0 = initial(torch.randn(case.paths, START))
        ys = torchsde.sdeint_adjoint(sde, y0, ts, dt=1.0 / case.steps, **options)
        (readout(ys[-1]) ** 2).mean().backward()
        return jnp.zeros(())

    return step


def generators(case: Case, rounds: int, seed: int) -> dict[str, Any]:
    """A generator step by every method."""
    key = jax.random.key(seed)
    reversible = dict(solver=ReversibleHeun(), adjoint=ReversibleAdjoint())
    methods = {
        "Heun, ours": ours(case, key),
        "Heun, diffrax": by_diffrax(case, key, diffrax.Heun()),
        "reversible Heun, ours, stored": ours(
            case, key, solver=ReversibleHeun(), adjoint=DiscreteAdjoint()
        ),
        "reversible Heun, ours": ours(case, key, **reversible),
        "reversible Heun, diffrax": by_diffrax(case, key, diffrax.ReversibleHeun()),
    }
    keys = jax.random.split(key, case.paths)
    calls, memory = measure.compiled_calls(methods, keys)
    torch = by_torchsde(case, seed)
    if torch is not None:
        calls["reversible Heun, torchsde"] = torch
    seconds = measure.interleaved(calls, rounds)
    claims = []
    for name, peer, most in (
        ("Heun, ours", "Heun, diffrax", 1 / 8),
        ("reversible Heun, ours", "reversible Heun, diffrax", 1 / 8),
        ("reversible Heun, ours", "reversible Heun, torchsde", 1 / 3),
    ):
        if peer in seconds:
            claims.append(
                measure.Claim(f"{name} / {peer}", measure.ratio(seconds, name, peer), most)
            )
    return measure.entry("generator", case._asdict(), seconds, memory, claims)


def latent(kind: str, key: jax.Array) -> nde.LatentSDE:
    """A small latent SDE with either posterior."""
    keys = jax.random.split(key, 6)
    if kind == "simulated":
        field = nde.fields.MLPField(4, 64, 1, context=32, time=True, key=keys[2])
        posterior = nde.latent_sde.PosteriorDrift(eqx.nn.Linear(32, 8, key=keys[1]), field)
    else:
        network = nde.fields.MLPField(32, 64, 1, out_size=8, time=True, key=keys[2])
        posterior = nde.latent_sde.PosteriorMarginals(network, 40.0)
    return nde.LatentSDE(
        nde.latent_sde.GRUEncoder(3, 64, 32, both_ways=kind == "matched", key=keys[0]),
        posterior,
        nde.fields.MLPField(4, 64, 1, key=keys[3]),
        nde.fields.OwnNoise(4, 8, least=0.05, most=1.0, key=keys[4]),
        eqx.nn.Linear(4, 3, key=keys[5]),
        nde.latent_sde.Gaussian(jnp.zeros(4), jnp.zeros(4)),
        observation_std=0.05,
        steps_per_interval=2,
    )


def latents(rounds: int, seed: int, batch: int = 64, times: int = 41) -> dict[str, Any]:
    """A step of either bound on the same batch."""
    key = jax.random.key(seed)
    ts = jnp.tile(jnp.linspace(0.0, 1.0, times), (batch, 1))
    ys = jnp.cumsum(jax.random.normal(key, (batch, times, 3)), axis=1) / 5
    data = nde.train.Batch((ts, ys), jnp.ones(batch, bool), jnp.array(0))
    methods = {
        "simulated": (latent("simulated", key), lambda m, key: losses.evidence(m, data, key)[0]),
        "low variance": (
            latent("simulated", key),
            lambda m, key: losses.evidence(m, data, key, low_variance=True)[0],
        ),
        "matched": (
            latent("matched", key),
            lambda m, key: losses.matched_evidence(m, data, key, samples=4)[0],
        ),
    }
    calls, memory = measure.compiled_calls(methods, key)
    seconds = measure.interleaved(calls, rounds)
    ratio = measure.ratio(seconds, "matched", "simulated")
    claims = [measure.Claim("matched / simulated", ratio, 1 / 3)]
    return measure.entry("latent SDE", {"batch": batch, "times": times}, seconds, memory, claims)


def plain_gram(x: jax.Array, y: jax.Array) -> jax.Array:
    """The same second-order scheme in two nested scans, for autodiff."""

    def kernel(x, y):
        d = jnp.diff(x, axis=0) @ jnp.diff(y, axis=0).T

        def row(above, d_row):
            def cell(left, inputs):
                upper, corner, d = inputs
                k = (left + upper) * (1 + d / 2 + d**2 / 12) - corner * (1 - d**2 / 12)
                return k, k

            _, rest = jax.lax.scan(cell, jnp.ones((), d.dtype), (above[1:], above[:-1], d_row))
            row = jnp.concatenate([jnp.ones(1, d.dtype), rest])
            return row, None

        return jax.lax.scan(row, jnp.ones(y.shape[0], d.dtype), d)[0][-1]

    return jax.vmap(lambda x: jax.vmap(lambda y: kernel(x, y))(y))(x)


def kernels(rounds: int, seed: int, paths: int = 32, times: int = 64) -> dict[str, Any]:
    """The gradient of a Gram matrix of paths with two channels."""
    x, y = jax.random.normal(jax.random.key(seed), (2, paths, times, 2)) * times**-0.5
    x, y = jnp.cumsum(x, axis=1), jnp.cumsum(y, axis=1)
    methods = {
        "ours": (x, lambda x, y: jnp.mean(losses.signature_gram(x, y, dyadic_order=0))),
        "autodiff of the sweep": (x, lambda x, y: jnp.mean(plain_gram(x, y))),
    }
    calls, memory = measure.compiled_calls(methods, y)
    seconds = measure.interleaved(calls, rounds)
    claims = [
        measure.Claim(
            "memory, ours / autodiff", memory["ours"] / memory["autodiff of the sweep"], 1 / 4
        ),
        measure.Claim(
            "ours / autodiff", measure.ratio(seconds, "ours", "autodiff of the sweep"), None
        ),
    ]
    report = measure.entry(
        "signature kernel", {"paths": paths, "times": times}, seconds, memory, claims
    )
    difference = measure.relative_difference(calls["ours"](), calls["autodiff of the sweep"]())
    return report | {"difference": difference}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", help="hidden,width,paths,steps of the generator")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cases = [Case(*map(int, c.split(","))) for c in args.cases] if args.cases else CASES
    entries = [generators(case, args.rounds, args.seed) for case in cases]
    entries += [latents(args.rounds, args.seed), kernels(args.rounds, args.seed)]
    measure.show_and_write(entries, args.out, ["jax", "equinox", "diffrax", "torch", "torchsde"])


if __name__ == "__main__":
    main()
