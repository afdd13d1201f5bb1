"""Whether this machine is fit for neural differential equations: `python -m nde.doctor`.

Versions, devices and settings that are known to hurt; then one solve against its closed form, and
one gradient against central differences. A few seconds, most of them compiling.
"""

import importlib.metadata
import platform
import sys
import time
from collections.abc import Iterator
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from nde.fields import MLPField
from nde.ode import NeuralODE

LIBRARIES = ("nde", "jax", "jaxlib", "equinox", "diffrax", "optax", "optimistix", "lineax", "numpy")


def main() -> int:
    """Print what was found; the number of checks that failed."""
    failed = 0
    for name, check in (
        ("versions", _versions),
        ("devices", _devices),
        ("precision", _precision),
        ("solve", _solve),
        ("gradient", _gradient),
    ):
        began = time.perf_counter()
        try:
            lines = list(check())
        except Exception as error:  # the other checks still say something
            lines = [f"FAILED  {type(error).__name__}: {str(error).splitlines()[0]}"]
        failed += any(line.startswith("FAILED") for line in lines)
        print(f"{name} ({time.perf_counter() - began:.1f} s)")
        print("".join(f"    {line}\n" for line in lines), end="", flush=True)
    print("all is well" if not failed else f"{failed} of 5 checks failed")
    return failed


def _versions() -> Iterator[str]:
    yield f"python {platform.python_version()}, {platform.platform()}"
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} -")
    yield ", ".join(found)


def _devices() -> Iterator[str]:
    for device in jax.devices():
        yield f"{device.platform} {device.id}: {device.device_kind}"
    if jax.default_backend() == "cpu" and jax.local_device_count() == 1:
        yield 'one CPU device; jax.config.update("jax_num_cpu_devices", 2) makes two for `mesh`'


def _precision() -> Iterator[str]:
    """Settings, and what a product of matrices really keeps."""
    config: Any = jax.config  # a type checker does not see what jax adds to it
    x64 = config.jax_enable_x64
    yield f"float64 is {'allowed' if x64 else 'off'} (jax_enable_x64), tolerances below 1e-6 need it"
    yield f"jax_default_matmul_precision is {config.jax_default_matmul_precision}"
    a = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
    exact = a[0].astype(float) @ a[1].astype(float)
    error = np.abs(np.asarray(jnp.asarray(a[0]) @ jnp.asarray(a[1])) - exact).max()
    if error > 1e-3:
        yield (
            f"HURTS   products of float32 matrices err by {error:.0e}: TF32 or bfloat16. Error estimates "
            'see it and steps shrink; jax.config.update("jax_default_matmul_precision", "highest")'
        )
    else:
        yield f"products of float32 matrices err by {error:.0e}"
    if config.jax_debug_nans:
        yield "HURTS   jax_debug_nans is on: a rejected step of an adaptive solve may hold nan"
    if config.jax_disable_jit:
        yield "HURTS   jax_disable_jit is on: a solve takes minutes"


def _solve() -> Iterator[str]:
    """y' = -y with a tolerance of 1e-5, against exp(-t)."""
    model = NeuralODE(lambda t, y, args: -y, stepsize_controller=_controller())
    ts = jnp.linspace(0.0, 2.0, 5)
    error = float(
        np.abs(np.asarray(model(ts, jnp.ones(2))) - np.exp(-np.asarray(ts))[:, None]).max()
    )
    yield _verdict(error < 1e-4, f"exp(-t) within {error:.0e}")


def _gradient() -> Iterator[str]:
    """Of a loss of a small network, along itself: (loss(p + hv) - loss(p - hv)) / 2h = gradient . v."""
    field = MLPField(2, width=8, depth=1, key=jax.random.key(0))
    ts, y0 = jnp.linspace(0.0, 1.0, 4), jnp.array([1.0, -0.5])

    @jax.jit
    @jax.value_and_grad
    def loss(scale: jax.Array) -> jax.Array:
        moved = jax.tree.map(lambda x: x * scale if isinstance(x, jax.Array) else x, field)
        return jnp.sum(NeuralODE(moved, stepsize_controller=_controller())(ts, y0) ** 2)

    def central(h: float) -> float:
        high, low = (float(loss(jnp.asarray(1 + s * h))[0]) for s in (1, -1))
        return (high - low) / (2 * h)

    slope, h = float(loss(jnp.ones(()))[1]), 1e-2
    difference = (4 * central(h) - central(2 * h)) / 3
    error = abs(slope - difference) / abs(slope)
    yield _verdict(error < 2e-3, f"central differences agree within {error:.0e} (of {slope:.4f})")


def _controller() -> diffrax.PIDController:
    return diffrax.PIDController(rtol=1e-5, atol=1e-6)


def _verdict(good: bool, text: str) -> str:
    return f"{'ok' if good else 'FAILED'}  {text}"


if __name__ == "__main__":
    sys.exit(min(1, main()))
