"""Training steps of a neural ODE, a flow and a latent ODE beside their peers.

    python benchmarks/models.py --out benchmarks/results/models.json
    python benchmarks/models.py --quick

The loss and its gradient with respect to all weights, float32, one compiled call (torch compiles nothing).
Every method has the same sizes, batch, solver (Tsit5, or dopri5 in torch) and tolerances.

    neural ODE    100 times of a spiral: the settings of diffrax's example, and torchdiffeq's `odeint` with
                  the whole batch as one state, differentiated through its steps or by its adjoint
    flow          log-likelihood in two dimensions with the exact trace: diffrax's example, and FFJORD
                  with torchdiffeq
    latent ODE    series of irregular times, encoded by a GRU (or an ODE-RNN) backwards: every series on its
                  own times, all on the union of the times (as a batch must be without `jax.vmap` over
                  times), and with torchdiffeq on the union

The flow of nde also runs reversibly, in constant memory. Peers that are not installed are left out.
Memory is what XLA plans for a call besides its arguments.
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
from nde.latent_ode import Gaussian, GRUEncoder
from nde.odernn import Backwards, Cell
from nde.solvers import Reversible, ReversibleAdjoint
from nde.train import Batch

RTOL, ATOL = 1e-3, 1e-6
ROUNDS = 5


class Sizes(NamedTuple):
    """Examples of a batch, times of a series, width of the networks."""

    batch: int
    times: int
    width: int


def controller() -> diffrax.PIDController:
    """The tolerances of all methods."""
    return diffrax.PIDController(rtol=RTOL, atol=ATOL)


def torch_network(inputs: int, outputs: int, width: int) -> Any:
    """Two hidden layers with softplus, and tanh at the end."""
    import torch

    layers = [torch.nn.Linear(inputs, width), torch.nn.Softplus()]
    layers += [torch.nn.Linear(width, width), torch.nn.Softplus()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(width, outputs), torch.nn.Tanh())


def torch_step(loss: Callable) -> Callable | None:
    """A call of `loss(torch, torchdiffeq)` and its gradient, if both are installed."""
    try:
        import torch
        import torchdiffeq
    except ImportError:
        return None
    torch.manual_seed(0)
    value = loss(torch, torchdiffeq)

    def step() -> jax.Array:
        value().backward()
        return jnp.zeros(())

    return step


def neural_ode(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Trajectories of a spiral at all times."""
    key = jax.random.key(0)
    ts = jnp.linspace(0.0, 10.0, sizes.times)
    y0s = jax.random.normal(key, (sizes.batch, 2))
    field = nde.fields.MLPField(2, sizes.width, 2, key=key)

    def by_model(model: nde.NeuralODE, y0s: jax.Array) -> jax.Array:
        return jnp.mean(jax.vmap(model, (None, 0))(ts, y0s) ** 2)

    def by_diffrax(field: Callable, y0s: jax.Array) -> jax.Array:
        def one(y0):
            term, saveat = diffrax.ODETerm(field), diffrax.SaveAt(ts=ts)
            return diffrax.diffeqsolve(
                term, diffrax.Tsit5(), ts[0], ts[-1], ts[1] - ts[0], y0, saveat=saveat,
                stepsize_controller=controller(),
            ).ys  # fmt: skip

        return jnp.mean(jax.vmap(one)(y0s) ** 2)

    def torch_loss(adjoint: bool) -> Callable:
        def loss(torch, torchdiffeq):
            network = torch_network(2, 2, sizes.width)
            y0, times = torch.randn(sizes.batch, 2), torch.linspace(0.0, 10.0, sizes.times)
            solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint

            class Field(torch.nn.Module):
                def __init__(self):
                    super().__init__()
                    self.network = network

                def forward(self, t, y):
                    return self.network(y)

            field = Field()
            options = {"rtol": RTOL, "atol": ATOL, "method": "dopri5"}
            return lambda: (solve(field, y0, times, **options) ** 2).mean()

        return loss

    methods = {
        "nde": (nde.NeuralODE(field, stepsize_controller=controller()), by_model),
        "diffrax's settings": (field, by_diffrax),
    }
    torch_calls = {
        "torchdiffeq": torch_step(torch_loss(False)),
        "torchdiffeq, adjoint": torch_step(torch_loss(True)),
    }
    return compared("neural ODE", sizes, methods, y0s, torch_calls, rounds)


def flow(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """The log-likelihood of points, with the exact trace."""
    key = jax.random.key(0)
    xs = jax.random.normal(key, (sizes.batch, 2))
    field = nde.fields.MLPField(2, sizes.width, 2, time=True, key=key)
    steps = 16
    reversible = {
        "solver": Reversible(diffrax.Bosh3()),
        "adjoint": ReversibleAdjoint(),
        "stepsize_controller": diffrax.ConstantStepSize(),
        "dt0": 1 / steps,
        "max_steps": steps,
    }

    def by_model(model: nde.CNF, xs: jax.Array) -> jax.Array:
        return -jnp.mean(jax.vmap(model.log_prob)(xs))

    def by_diffrax(field: Callable, xs: jax.Array) -> jax.Array:
        """Point and divergence are one state, and the trace comes from the whole Jacobian."""

        def both(t, state, args):
            x, _ = state
            f, vjp = jax.vjp(lambda x: field(t, x), x)
            (jacobian,) = jax.vmap(vjp)(jnp.eye(2))
            return f, jnp.trace(jacobian)

        def one(x):
            term = diffrax.ODETerm(both)
            z, gained = diffrax.diffeqsolve(
                term, diffrax.Tsit5(), 1.0, 0.0, -0.05, (x, jnp.zeros(())),
                stepsize_controller=controller(),
            ).ys  # fmt: skip
            return nde.cnf.Normal(2).log_prob(z[0]) + gained[0]

        return -jnp.mean(jax.vmap(one)(xs))

    def torch_loss(torch, torchdiffeq):
        network = torch_network(3, 2, sizes.width)
        x0 = torch.randn(sizes.batch, 2)

        class Both(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.network = network

            def forward(self, t, state):
                x = state[0].requires_grad_(True)
                with torch.enable_grad():
                    f = self.network(torch.cat([x, t.expand(len(x), 1)], dim=1))
                    rows = [
                        torch.autograd.grad(f[:, i].sum(), x, create_graph=True)[0][:, i]
                        for i in range(2)
                    ]
                return f, sum(rows)

        both, times = Both(), torch.tensor([1.0, 0.0])
        options = {"rtol": RTOL, "atol": ATOL, "method": "dopri5"}

        def loss():
            start = (x0.clone(), torch.zeros(sizes.batch))
            z, gained = torchdiffeq.odeint_adjoint(both, start, times, **options)
            return ((z[-1] ** 2).sum(dim=1) / 2 - gained[-1]).mean()

        return loss

    base = nde.cnf.Normal(2)
    methods = {
        "nde": (nde.CNF(field, base, stepsize_controller=controller()), by_model),
        f"nde, reversible, {steps} steps": (nde.CNF(field, base, **reversible), by_model),
        "diffrax's settings": (field, by_diffrax),
    }
    torch_calls = {"torchdiffeq, adjoint": torch_step(torch_loss)}
    return compared("flow", sizes, methods, xs, torch_calls, rounds)


HIDDEN, LATENT = 16, 4


def latent_model(kind: str, width: int) -> nde.LatentODE:
    """A small latent ODE with either encoder."""
    keys = jax.random.split(jax.random.key(0), 6)
    encoder: Any = GRUEncoder(1, HIDDEN, HIDDEN, key=keys[0])
    if kind == "ODE-RNN":
        recurrent = nde.ODERNN(
            nde.fields.MLPField(HIDDEN, width, 1, key=keys[0]),
            Cell(eqx.nn.GRUCell(2, HIDDEN, key=keys[1])),
            eqx.nn.Linear(HIDDEN, HIDDEN, key=keys[2]),
            jnp.zeros(HIDDEN),
        )
        encoder = Backwards(recurrent)
    return nde.LatentODE(
        encoder,
        eqx.nn.Linear(HIDDEN, 2 * LATENT, key=keys[3]),
        nde.fields.MLPField(LATENT, width, 2, key=keys[4]),
        eqx.nn.Linear(LATENT, 1, key=keys[5]),
        Gaussian(jnp.zeros(LATENT), jnp.zeros(LATENT)),
        observation_std=0.1,
        stepsize_controller=controller(),
    )


def on_the_union(ts: jax.Array, ys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All series on the times of all of them, NaN where a series was not observed."""
    series, times = ts.shape
    union = jnp.sort(ts.reshape(-1))
    columns = jnp.searchsorted(union, ts)
    rows = jnp.arange(series)[:, None]
    values = jnp.full((series, series * times, ys.shape[2]), jnp.nan).at[rows, columns].set(ys)
    return jnp.tile(union, (series, 1)), values


def latent_ode(sizes: Sizes, rounds: int) -> dict[str, Any]:
    """The bound of a batch of irregular series."""
    key = jax.random.key(0)
    ts = jnp.sort(jax.random.uniform(key, (sizes.batch, sizes.times)), axis=1)
    data = (ts, jnp.sin(8 * ts)[..., None])

    def bound(model: nde.LatentODE, data: Any) -> jax.Array:
        return losses.evidence(model, Batch(data), key, per="value")[0]

    def union(model: nde.LatentODE, data: Any) -> jax.Array:
        return bound(model, on_the_union(*data))

    def torch_loss(torch, torchdiffeq):
        cell, width = torch.nn.GRUCell(3, HIDDEN), sizes.width
        initial = torch.nn.Linear(HIDDEN, 2 * LATENT)
        network, decoder = torch_network(LATENT, LATENT, width), torch.nn.Linear(LATENT, 1)
        times, values = (torch.tensor(for_torch(x)) for x in on_the_union(*data))
        grid, seen = times[0], ~torch.isnan(values)
        filled = torch.where(seen, values, torch.zeros(()))
        gaps = torch.diff(grid, append=grid[-1:])
        options = {"rtol": RTOL, "atol": ATOL, "method": "dopri5"}

        def loss():
            h = torch.zeros(sizes.batch, HIDDEN)
            for i in range(len(grid) - 1, -1, -1):
                gap = gaps[i].expand(sizes.batch, 1)
                told = torch.cat([filled[:, i], seen[:, i].float(), gap], dim=1)
                h = torch.where(seen[:, i], cell(told, h), h)
            mean, log_std = initial(h).chunk(2, dim=1)
            z0 = mean + log_std.exp() * torch.randn_like(mean)
            zs = torchdiffeq.odeint(lambda t, z: network(z), z0, grid, **options)
            error = torch.where(seen, decoder(zs).transpose(0, 1) - filled, torch.zeros(()))
            kl = ((mean**2 + (2 * log_std).exp() - 1) / 2 - log_std).sum()
            return ((error**2).sum() / (2 * 0.1**2) + kl) / seen.sum()

        return loss

    gru, recurrent = (latent_model(kind, sizes.width) for kind in ("GRU", "ODE-RNN"))
    methods = {
        "nde": (gru, bound),
        "nde, union of times": (gru, union),
        "nde, ODE-RNN": (recurrent, bound),
        "nde, ODE-RNN, union of times": (recurrent, union),
    }
    torch_calls = {"torchdiffeq, union of times": torch_step(torch_loss)}
    pairs = [("nde", "nde, union of times"), ("nde, ODE-RNN", "nde, ODE-RNN, union of times")]
    return compared("latent ODE", sizes, methods, data, torch_calls, rounds, pairs)


def for_torch(x: jax.Array) -> Any:
    """An array that torch takes."""
    import numpy as np

    return np.asarray(x, dtype=np.float32)


def compared(
    what: str,
    sizes: Sizes,
    methods: dict[str, tuple[Any, Callable]],
    inputs: Any,
    torch_calls: dict[str, Callable | None],
    rounds: int,
    pairs: list[tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """Times in turns, and ratios to each peer."""
    calls, memory = measure.compiled_calls(methods, inputs)
    calls |= {name: call for name, call in torch_calls.items() if call is not None}
    seconds = measure.interleaved(calls, rounds)
    peers = [name for name in calls if not name.startswith("nde")]
    pairs = [("nde", peer) for peer in peers] + (pairs or [])
    claims = [
        measure.Claim(f"{name} / {peer}", measure.ratio(seconds, name, peer), 1.0)
        for name, peer in pairs
    ]
    return measure.entry(what, sizes._asdict(), seconds, memory, claims)


def main() -> None:
    """Runs all cases, and saves them if `--out` is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run at all?")
    parser.add_argument("--out", type=Path, help="where to save the results (JSON)")
    args = parser.parse_args()
    rounds = 1 if args.quick else args.rounds
    small, some = Sizes(4, 5, 8), Sizes(32, 30, 32)
    entries = [
        neural_ode(small if args.quick else Sizes(256, 100, 64), rounds),
        flow(small if args.quick else Sizes(256, 2, 64), rounds),
        latent_ode(small if args.quick else some, rounds),
    ]
    packages = ["nde", "jax", "jaxlib", "diffrax", "equinox", "torch", "torchdiffeq"]
    measure.show_and_write(entries, args.out, packages)


if __name__ == "__main__":
    main()
