"""What `nde.fit` costs beside the bare step that it makes, and what a second device gains.

    python benchmarks/training.py --out benchmarks/results/training.json

- overhead: seconds of `fit` on small neural ODEs beside a loop over one jitted step (the same loss,
  optimizer and batches), with its own compilation left out of both;
- again: seconds to the first step of a second `fit` with the same shapes, beside the first;
- memory: resident memory after 10,000 steps beside that after the first 1,000;
- devices: a batch of 256 small trajectories on two devices of the processor beside one.
"""

import argparse
import os
import resource
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import measure
import optax

import nde

TIMES = 20


def problem(examples: int, width: int) -> tuple[nde.NeuralODE, tuple[jax.Array, jax.Array]]:
    """Rotations, and a small neural ODE."""
    ts = jnp.linspace(0.0, 1.0, TIMES)
    angles = 6.0 * ts[None] + jnp.linspace(0.0, 6.0, examples)[:, None]
    ys = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    field = nde.fields.MLPField(2, width, 2, scale=7.0, key=jax.random.key(0))
    return nde.NeuralODE(field), (jnp.tile(ts, (examples, 1)), ys)


def bare_loop(model: Any, data: Any, batch: int, steps: int) -> Any:
    """The same training by hand: one jitted step, batches drawn inside."""
    optim, key = optax.adam(1e-3), jax.random.key(1)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    @jax.jit
    def step(params, state, index):
        draw = jax.random.fold_in(key, index)
        rows = jax.random.permutation(draw, data[0].shape[0])[:batch]
        cut = nde.train.Batch(jax.tree.map(lambda x: x[rows], data), jnp.ones(batch, bool), index)

        def loss(params):
            return nde.losses.trajectory(eqx.combine(params, static), cut, draw)

        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optim.update(grads, state, params)
        return eqx.apply_updates(params, updates), state, value

    def run() -> Any:
        state, now, values = optim.init(params), params, []
        for index in range(steps):
            now, state, value = step(now, state, jnp.int32(index))
            values.append(value)
        return jax.block_until_ready(values)

    return run


def fitted(model: Any, data: Any, batch: int | None, steps: int, **options: Any) -> Any:
    """A call of `fit`."""
    loss = nde.losses.trajectory
    options |= dict(optim=optax.adam(1e-3), steps=steps, batch_size=batch, progress=False)
    return lambda: nde.fit(model, loss, data, key=jax.random.key(1), **options)[1].seconds


def overhead(steps: int, rounds: int) -> dict[str, Any]:
    """`fit` beside the bare loop, for two sizes of a step."""
    entries = []
    for width, batch in ((32, 16), (64, 128)):
        model, data = problem(256, width)
        calls = {
            "bare": bare_loop(model, data, batch, steps),
            "fit": fitted(model, data, batch, steps),
        }
        seconds = measure.interleaved(calls, rounds)
        ratio = measure.ratio(seconds, "fit", "bare")
        entries.append(
            {
                "width": width,
                "batch": batch,
                "bare step, ms": 1e3 * min(seconds["bare"]) / steps,
                "claim": measure.Claim(f"fit / bare, width {width}", ratio, 1.03),
            }
        )
    return {"what": "overhead", "steps": steps, "entries": entries}


def again() -> dict[str, Any]:
    """Seconds until the first step of two equal calls."""
    model, data = problem(64, 32)

    def compiling() -> float:
        _, history = nde.fit(
            model,
            nde.losses.trajectory,
            data,
            optim=optax.adam(1e-3),
            steps=2,
            progress=False,
            key=jax.random.key(0),
        )
        return history.compile_seconds

    first, second = compiling(), compiling()
    return {
        "what": "again",
        "entries": [
            {
                "first, s": first,
                "second, s": second,
                "claim": measure.Claim("second compile / first", second / first, 0.05),
            }
        ],
    }


def memory(steps: int = 10_000) -> dict[str, Any]:
    """The largest resident memory before and after many tiny steps."""
    model = eqx.nn.MLP(2, 2, 8, 1, key=jax.random.key(0))
    data = jnp.ones((32, 2))

    def loss(model, batch, key):
        return jnp.mean((jax.vmap(model)(batch.data) - batch.data) ** 2)

    def run(steps: int) -> float:
        nde.fit(
            model,
            loss,
            data,
            optim=optax.adam(1e-3),
            steps=steps,
            progress=False,
            key=jax.random.key(0),
        )
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

    few, many = run(1000), run(steps)
    claim = measure.Claim("memory, 10,000 steps / 1,000", many / few, 1.05)
    return {"what": "memory", "entries": [{"few, MB": few, "many, MB": many, "claim": claim}]}


def devices(steps: int, rounds: int) -> dict[str, Any]:
    """One and two devices of the processor, 256 trajectories a step."""
    entries = []
    for width in (32, 128):
        model, data = problem(256, width)
        meshes = {count: jax.make_mesh((count,), ("batch",)) for count in (1, 2)}
        calls = {
            f"{count} devices": fitted(model, data, None, steps, mesh=mesh)
            for count, mesh in meshes.items()
        }
        seconds = measure.interleaved(calls, rounds)
        ratio = measure.ratio(seconds, "2 devices", "1 devices")
        claim = measure.Claim(f"2 devices / 1, width {width}", ratio, 1 / 1.5)
        entries.append({"width": width, "claim": claim})
    return {"what": "devices", "steps": steps, "entries": entries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ["JAX_NUM_CPU_DEVICES"] = "2"  # of the process that `devices` runs in
    began = time.perf_counter()
    report = [
        overhead(options.steps, options.rounds),
        again(),
        memory(),
        measure.in_fresh_process(devices, options.steps // 4, options.rounds),
    ]
    for part in report:
        for entry in part["entries"]:
            claim = entry.pop("claim")
            print(claim.line(), {k: measure.significant(v) for k, v in entry.items()})
            entry["claim"] = claim.record()
    print(f"{time.perf_counter() - began:.0f} s in all")
    if options.out:
        environment = measure.environment(["jax", "equinox", "diffrax", "optax"])
        measure.write(
            options.out, {"environment": environment, "cases": measure.significant(report)}
        )


if __name__ == "__main__":
    main()
