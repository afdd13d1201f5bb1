"""One of two processes that train together: `python processes.py PORT NUMBER FOLDER`."""

import sys
import time
from pathlib import Path

import diffrax
import jax
import numpy as np
import optax

import nde


def field(t, y, p):
    return -p["k"] * y


def series(rates):
    ts = np.broadcast_to(np.linspace(0.0, 1.0, 5), (len(rates), 5))
    return ts, np.exp(-np.asarray(rates)[:, None] * ts)[..., None]


def train(data, *, max_steps=256, **options):
    model = nde.HybridODE(field, None, {"k": 0.5}, max_steps=max_steps, solver=diffrax.Heun())
    standard = {"steps": 4, "optim": optax.adam(0.1), "key": jax.random.key(0), "progress": False}
    trained, _ = nde.fit(model, nde.losses.trajectory, data, **standard | options)
    return float(trained.parameters["k"])


def stiff(rates):
    """The last example needs more steps than there are: it belongs to the other process."""
    ts, ys = series(rates)
    return ts * np.array([1.0, 1.0, 1.0, 1e5])[:, None], ys


def said(call):
    began = time.monotonic()
    try:
        call()
    except Exception as error:
        waited = time.monotonic() - began - error.history.compile_seconds
        assert waited < 30, waited
        return f"{type(error).__name__} {str(error).split(',')[0]}"
    return "nothing"


def main(port, number, folder):
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, number)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    data, path = series([1.0, 2.0, 3.0]), Path(folder) / "run"
    print("alone", train(data))
    print("together", train(data, mesh=mesh))

    def stop(numbers):
        if numbers["step"] == 1:
            raise StopAsyncIteration

    assert "StopAsync" in said(
        lambda: train(data, mesh=mesh, checkpoint=path, every=1, callbacks=stop)
    )
    print("resumed", train(data, mesh=mesh, checkpoint=path, every=1))
    print("failed", said(lambda: train(stiff([1.0] * 4), max_steps=64, mesh=mesh)))

    def batches():
        yield data
        if number == 1:
            raise OSError("a disk of this process alone")
        while True:
            yield data

    print("broken", said(lambda: train(batches(), mesh=mesh, steps=30)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
