"""Training on two devices is training on one: the same numbers, one all-reduce, the same errors."""

import itertools
import re
import socket
import subprocess
import sys
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from least_squares import DATA, fit, squares
from messages import mentions

import nde
from nde._training import run as run_module
from nde.solvers import SolveError
from nde.train import NonFiniteError, Turn, Validation, multi_start

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("processes.py")
KEY = jax.random.key(0)
W = {"w": jnp.zeros(3)}


@pytest.fixture(scope="module", params=["explicit", "auto"])
def mesh(request):
    kind = getattr(jax.sharding.AxisType, request.param.capitalize())
    return jax.make_mesh((2,), ("data",), axis_types=(kind,))


MESH = jax.make_mesh((2,), ("data",))


def noisy(model, batch, key):
    """A mean over examples, each with noise of its own."""
    x, y = batch.data
    noise = 0.1 * jax.vmap(jax.random.normal)(batch.keys)
    return nde.losses.mse(x @ model["w"] + noise, y, batch.mask), {
        "noise": jnp.sum(jnp.where(batch.mask, noise, 0.0)) / jnp.sum(batch.mask, dtype=float)
    }


@pytest.mark.parametrize("options", [{"batch_size": 3}, {}, {"batch_size": 7, "accumulate": 2}])
def test_two_devices_train_the_model_of_one(options, mesh):
    """With batches that are odd, or shorter than the devices are many."""
    options = {"optim": optax.adam(0.1), "steps": 8, "validation": Validation(DATA, 4)} | options
    one, reference = fit(W, noisy, **options)
    two, history = fit(W, noisy, mesh=mesh, **options)
    np.testing.assert_allclose(two["w"], one["w"], rtol=1e-12)
    for name in ("loss", "noise", "validation", "gradient_norm"):
        np.testing.assert_allclose(history[name], reference[name], rtol=1e-12)


def test_an_iterator_is_divided_as_well():
    def batches():
        for i in itertools.count():
            yield tuple(np.asarray(leaf[: 5 - i % 3]) for leaf in DATA)

    one, _ = fit(W, noisy, batches(), steps=7)
    two, _ = fit(W, noisy, batches(), steps=7, mesh=MESH)
    np.testing.assert_allclose(two["w"], one["w"], rtol=1e-12)


def field(t, y, p):
    """Of a rate that differs a thousandfold between examples."""
    return -p["k"] * y[1] * jnp.stack([y[0], jnp.zeros_like(y[0])])


def series(rates):
    ts = jnp.broadcast_to(jnp.linspace(0.0, 1.0, 5), (len(rates), 5))
    rates = jnp.broadcast_to(jnp.asarray(rates)[:, None], ts.shape)
    return ts, jnp.stack([jnp.exp(-ts), rates], axis=-1)


def oscillator(max_steps=4096):
    return nde.HybridODE(field, None, {"k": 0.5}, max_steps=max_steps, solver=diffrax.Heun())


def compiled_step(monkeypatch, *args, **options):
    """The text of the compiled step of a run."""
    calls, call = [], run_module._Run._call

    def spy(self, name, program, arguments):
        calls.append((program(), arguments))
        return call(self, name, program, arguments)

    monkeypatch.setattr(run_module._Run, "_call", spy)
    result = fit(*args, **options)
    step, arguments = calls[0]
    return step.lower(*arguments).compile().as_text(), result


def loops(text):
    """The bodies of the loops of a program, with all that they call."""
    bodies = {}
    for match in re.finditer(r"^%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        bodies[match[1]] = match[2]
    todo, seen = set(re.findall(r"(?:body|condition)=%?([\w.\-]+)", text)), set()
    while todo:
        name = todo.pop()
        seen.add(name)
        called = re.findall(r"(?:to_apply|calls|body|condition)=%?([\w.\-]+)", bodies[name])
        todo |= set(called) - seen
    return [bodies[name] for name in seen]


def test_lanes_of_five_and_of_five_hundred_steps_meet_in_one_all_reduce(monkeypatch):
    """The device with the easy half waits at the end of the step, and nowhere else."""
    data = series([1.0] * 3 + [1000.0] * 3)
    options = {"steps": 3, "optim": optax.sgd(1e-3)}
    one, reference = fit(oscillator(), nde.losses.trajectory, data, **options)
    text, (two, history) = compiled_step(
        monkeypatch, oscillator(), nde.losses.trajectory, data, mesh=MESH, **options
    )
    np.testing.assert_allclose(two.parameters["k"], one.parameters["k"], rtol=1e-12)
    for name in ("loss", "nfe"):
        np.testing.assert_allclose(history[name], reference[name], rtol=1e-12)
    collectives = (
        r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\("
    )
    assert len(re.findall(collectives, text)) == 1 and " all-reduce" in text
    inside = loops(text)
    assert inside and not any(re.search(collectives, body) for body in inside)


def test_missing_values_count_the_same_wherever_they_are():
    ts, ys = series([1.0, 2.0, 3.0, 4.0])
    ys = ys.at[0, 1:4, 0].set(jnp.nan).at[3, 2, 1].set(jnp.nan)
    one, reference = fit(oscillator(), nde.losses.trajectory, (ts, ys), steps=3)
    two, history = fit(oscillator(), nde.losses.trajectory, (ts, ys), steps=3, mesh=MESH)
    np.testing.assert_allclose(two.parameters["k"], one.parameters["k"], rtol=1e-12)
    np.testing.assert_allclose(history["loss"], reference["loss"], rtol=1e-12)


def test_a_failure_on_one_device_is_the_failure_of_all():
    data = series([1.0, 1.0, 1.0, 1e5])
    with pytest.raises(SolveError, match=r"25% .* The first is example 3\. 1 x The maximum"):
        fit(oscillator(64), nde.losses.trajectory, data, mesh=MESH)

    def bad(model, batch, key):
        return jnp.sum(jnp.where(batch.data[1] > 2, jnp.nan, 1.0)) * squares(
            model | {"scale": 1.0}, batch, key
        )

    with pytest.raises(NonFiniteError, match="value of the loss") as caught:
        fit(W, bad, (DATA[0], jnp.arange(10.0)), mesh=MESH)
    np.testing.assert_array_equal(caught.value.model["w"], W["w"])


def test_players_and_line_searches_on_a_mesh():
    turns = [
        Turn(noisy, optax.lbfgs(), lambda m: m["w"]),
        Turn(lambda m, b, k: (m["v"] - jnp.mean(b.data[1])) ** 2, optax.sgd(0.1), lambda m: m["v"]),
    ]
    start = W | {"v": jnp.zeros(())}
    options = {"steps": 6, "key": KEY, "progress": False}
    one, _ = nde.fit(start, turns[:1], DATA, **options)
    two, _ = nde.fit(start, turns[:1], DATA, mesh=MESH, **options)
    np.testing.assert_allclose(two["w"], one["w"], rtol=1e-9)


def test_starts_are_divided_over_devices():
    def make(key):
        return {"w": jax.random.normal(key, (3,)), "scale": jnp.ones(())}

    options = {"optim": optax.adam(0.1), "steps": 6, "progress": False, "key": KEY}
    expected, references = multi_start(make, squares, DATA, starts=4, **options)
    models, histories = multi_start(make, squares, DATA, starts=4, mesh=MESH, **options)
    for (a, b), (c, d) in zip(
        zip(models, histories, strict=True), zip(expected, references, strict=True), strict=True
    ):
        np.testing.assert_allclose(a["w"], c["w"], rtol=1e-12)
        np.testing.assert_allclose(b["loss"], d["loss"], rtol=1e-12)


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"`mesh` has 2 devices but there are 3 starts"):
        multi_start(
            lambda k: W, squares, DATA, starts=3, mesh=MESH, optim=optax.sgd(0.1), steps=1, key=KEY
        )
    with pytest.raises(ValueError, match=r"`mesh` is 2; give jax.make_mesh"):
        fit(W, noisy, mesh=2)
    model = nde.HybridODE(field, None, {"k": 0.5}, adjoint=diffrax.RecursiveCheckpointAdjoint())
    with pytest.raises(ValueError, match=mentions(["`mesh`", "nde.solvers.DiscreteAdjoint()"])):
        fit(model, nde.losses.trajectory, series([1.0, 2.0]), mesh=MESH, steps=1)


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def processes(folder):
    """What two processes print that train together, by name."""
    port, running = free_port(), []
    for number in range(2):
        command = [sys.executable, str(SCRIPT), str(port), str(number), str(folder)]
        running.append(
            subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        outs = [process.communicate(timeout=400)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    names = ("alone", "together", "resumed", "failed", "broken")
    lines = [[line.partition(" ") for line in out.splitlines()] for out in outs]
    return [{a: b for a, _, b in found if a in names} for found in lines], outs


@pytest.mark.slow
def test_two_processes_train_the_model_of_one(tmp_path):
    """Equality, a run that is continued, and failures, in one start of two processes."""
    (first, second), outs = processes(tmp_path)
    assert len(first) == len(second) == 5, outs
    assert float(first["together"]) == pytest.approx(float(first["alone"]), rel=1e-12)
    assert first["resumed"] == first["together"] == second["together"] == second["resumed"]
    assert first["failed"].startswith("SolveError 25% of the solves failed at step 0")
    assert second["failed"] == first["failed"]
    assert second["broken"].startswith("OSError a disk of this process alone")
    assert first["broken"].startswith("RuntimeError Another process ended the training of all")
