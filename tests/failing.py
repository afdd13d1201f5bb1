"""Solves that fail, each for one reason.

All fields are one function, chosen by a number in `args`, with states {"a": (2,), "b": ()}: a solve is
compiled once per dtype and controller, whatever fails. With `sign` -1 time runs backwards: the same
solution at the times -t.
"""

from typing import Any, NamedTuple

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    """dy/dt = field(t, a, b) from `a`, `b` on [t0, t1]."""

    cause: str | None
    field: str = "oscillator"
    a: tuple[float, float] = (1.0, 0.5)
    b: float = 0.2
    t1: float = 1.0
    t0: float = 0.0
    dt0: float = 1e-3
    rtol: Any = 1e-5
    atol: Any = 1e-8
    constant: bool = False
    leaf: str | None = None
    stop: float | None = None  # where the solution ends, in closed form


def pair(x, y):
    return jnp.stack([x, y])


# (t, a, b) -> (da/dt, db/dt)
FIELDS = {
    "oscillator": lambda t, a, b: (pair(a[1], -a[0]), -b),
    "fast oscillator": lambda t, a, b: (2000.0 * pair(a[1], -a[0]), -b),
    "chirp": lambda t, a, b: (pair(jnp.cos(t**2), -a[1]), -b),
    "ringing": lambda t, a, b: (pair(a[1], -1e6 * a[0] - 0.1 * a[1]), -b),
    "undefined late": lambda t, a, b: (pair(a[1], jnp.where(t > 0.5, jnp.nan, -a[0])), -b),
    "undefined always": lambda t, a, b: (pair(a[1], jnp.sqrt(-1 - a[0] ** 2)), -b),
    "drained": lambda t, a, b: (pair(a[1], -a[0]), -jnp.sqrt(b)),
    "logarithm": lambda t, a, b: (pair(-1.0 - 0 * b, jnp.log(a[0])), -b),
    "pole": lambda t, a, b: (pair(1 / (2.0 - a[0]), a[0]), -b),
    "pole in time": lambda t, a, b: (pair(a[1], -a[0]), 1 / jnp.abs(0.5 - t) ** 1.5),
    "quench": lambda t, a, b: (pair(a[1], -a[0]), -1 / b),
    "overflow in time": lambda t, a, b: (pair(a[1], jnp.exp(2000 * (t - 0.5))), -b),
    "square": lambda t, a, b: (pair(a[0] ** 2, -a[1]), -b),
    "tangent": lambda t, a, b: (pair(a[1], -a[0]), 1 + b**2),
    "exponential": lambda t, a, b: (pair(a[1], jnp.exp(a[1])), -b),
    "fifth power": lambda t, a, b: (pair(a[0] ** 5, -a[1]), -b),
    "pair": lambda t, a, b: (pair(a[0] * a[1], a[0] * a[1]), -b),
    "offset": lambda t, a, b: (pair(a[0] ** 2, 0 * a[1]), -b),
    "spring": lambda t, a, b: (pair(a[1], 6 * a[0] ** 2), -b),
    "relaxed": lambda t, a, b: (pair(-1e7 * (a[0] - jnp.cos(t)), -a[0]), -b),
    "robertson": lambda t, a, b: (
        pair(-0.04 * a[0] + 1e4 * a[1] * b, 0.04 * a[0] - 1e4 * a[1] * b - 3e7 * a[1] ** 2),
        3e7 * a[1] ** 2,
    ),
    "van der Pol": lambda t, a, b: (pair(a[1], 1e6 * (1 - a[0] ** 2) * a[1] - a[0]), -b),
    "separated": lambda t, a, b: (
        pair(-2e6 * a[0] + 1.999e6 * a[1] + 1, 1.999e6 * a[0] - 2e6 * a[1]),
        -b,
    ),
    "cubic": lambda t, a, b: (pair(-1e6 * a[0] * (a[0] ** 2 - b**2), -a[1]), jnp.cos(t)),
    "sliding": lambda t, a, b: (pair(-jnp.sign(a[0]), -a[1]), -b),
    "flame": lambda t, a, b: (a**2 - a**3, -b),
    "collision": lambda t, a, b: (pair(a[1], -a[0] / jnp.abs(a[0]) ** 3), -b),
    "decay": lambda t, a, b: (-1000.0 * a, -b),
    "logistic": lambda t, a, b: (a * (1 - a) * 5.0, -b),
    "growth": lambda t, a, b: (a, -b),
    "waking": lambda t, a, b: (-1e7 * jax.nn.sigmoid(200 * (t - 0.5)) * (a - jnp.sin(t)), -b),
    "steep": lambda t, a, b: (pair(jnp.exp(a[0]) * (5.0 - a[0]), -a[1]), -b),
}
NAMES = list(FIELDS)
INF, NAN = float("inf"), float("nan")

CASES = {
    # 1: y0 is not finite
    "nan": Case("bad_input", a=(1.0, NAN), leaf="y['a'][1]"),
    "inf": Case("bad_input", b=INF, leaf="y['b']"),
    "-inf": Case("bad_input", a=(-INF, 0.0), leaf="y['a'][0]"),
    "all nan": Case("bad_input", a=(NAN, NAN), b=NAN, leaf="y['a'][0]"),
    "constant steps": Case("bad_input", b=NAN, constant=True, leaf="y['b']"),
    # 2: a time is not finite
    "t1 inf": Case("bad_input", t1=INF),
    "t1 nan": Case("bad_input", t1=NAN),
    "t0 nan": Case("bad_input", t0=NAN),
    "t1 -inf": Case("bad_input", t1=-INF),
    "dt0 nan": Case("bad_input", dt0=NAN),
    # 3: the first step does not move
    "dt0 zero": Case("zero_step", dt0=0.0),
    "dt0 tiny": Case("zero_step", t0=1.0, t1=2.0, dt0=1e-20),
    "far from zero": Case("zero_step", t0=1e17, t1=2e17, dt0=1.0),
    "far, constant": Case("zero_step", t0=1e17, t1=2e17, dt0=1.0, constant=True),
    "dt0 zero, constant": Case("zero_step", dt0=0.0, constant=True),
    # 4: tolerances that cannot be met
    "both zero": Case("bad_input", rtol=0.0, atol=0.0),
    "negative": Case("bad_input", atol=-1e-6),
    "undefined tolerance": Case("bad_input", rtol=NAN),
    "negative rtol": Case("bad_input", rtol=-1e-3),
    "one zero, one negative": Case("bad_input", rtol=0.0, atol=-1.0),
    "too loose": Case("tolerance", "robertson", a=(1.0, 0.0), b=0.0, t1=4.0, rtol=1e-3, atol=1e-6),
    # 5: the field is undefined
    "late": Case("vector_field", "undefined late", leaf="y['a'][1]", stop=0.5),
    "late, constant": Case("vector_field", "undefined late", constant=True, leaf="y['a'][1]"),
    "always": Case("vector_field", "undefined always", leaf="y['a'][1]"),
    "root": Case("vector_field", "drained", t1=2.0, leaf="y['b']", stop=2 * 0.2**0.5),
    "log": Case("vector_field", "logarithm", t1=2.0, leaf="y['a'][1]", stop=1.0),
    "pole": Case("vector_field", "pole", t1=2.0, leaf="y['a'][0]"),
    "pole in time": Case("vector_field", "pole in time", leaf="y['b']", stop=0.5),
    "quench": Case("vector_field", "quench", leaf="y['b']", stop=0.02),
    "overflow": Case("vector_field", "overflow in time", leaf="y['a'][1]"),
    "collision": Case("vector_field", "collision", a=(1.0, 0.0), t1=2.0, stop=np.pi / 8**0.5),
    # 6: the solution escapes
    "square": Case("blow_up", "square", t1=2.0, leaf="y['a'][0]", stop=1.0),
    "tangent": Case("blow_up", "tangent", b=0.0, t1=3.0, leaf="y['b']", stop=np.pi / 2),
    "exponential": Case("blow_up", "exponential", t1=2.0, leaf="y['a'][1]", stop=np.exp(-0.5)),
    "fifth power": Case("blow_up", "fifth power", leaf="y['a'][0]", stop=0.25),
    "pair": Case("blow_up", "pair", t1=5.0, stop=2 * np.log(2)),
    "offset": Case("blow_up", "offset", a=(1.0, 1e6), t1=2.0, leaf="y['a'][0]", stop=1.0),
    "spring": Case("blow_up", "spring", t1=5.0, leaf="y['a'][1]"),
    "growth": Case("blow_up", "growth", t1=1000.0),
    "square, constant": Case("blow_up", "square", t1=5.0, constant=True, leaf="y['a'][0]"),
    "fifth power, constant": Case("blow_up", "fifth power", constant=True, leaf="y['a'][0]"),
    "exponential, constant": Case(
        "blow_up", "exponential", t1=2.0, constant=True, leaf="y['a'][1]"
    ),
    "spring, constant": Case("blow_up", "spring", t1=5.0, dt0=1e-2, constant=True),
    "tangent, constant": Case("blow_up", "tangent", b=0.0, t1=3.0, dt0=1e-2, constant=True),
    # 7: tolerances below the precision
    "oscillator": Case("precision", t1=50.0, rtol=1e-17, atol=1e-30),
    "logistic": Case("precision", "logistic", t1=20.0, a=(0.1, 0.2), rtol=1e-17, atol=1e-30),
    "atol alone": Case("precision", t1=50.0, rtol=0.0, atol=1e-25),
    "slower": Case("precision", t1=50.0, b=0.5, rtol=1e-18, atol=1e-28),
    "rtol alone": Case("precision", "square", a=(-1.0, 0.5), t1=50.0, rtol=1e-18, atol=0.0),
    "coarse times": Case("zero_step", t0=1e17, t1=1.01e17, dt0=1e12),
    # 8: stiff
    "relaxed": Case("stiff", "relaxed", t1=10.0),
    "robertson": Case("stiff", "robertson", a=(1.0, 0.0), b=0.0, t1=1e6),
    "robertson, loose": Case(
        "stiff", "robertson", a=(1.0, 0.0), b=0.0, t1=100.0, rtol=1e-3, atol=1e-6
    ),
    "van der Pol": Case("stiff", "van der Pol", a=(2.0, 0.0), t1=2.0),
    "separated": Case("stiff", "separated", t1=10.0),
    "waking": Case("stiff", "waking", t1=2.0),
    "cubic": Case("stiff", "cubic", t1=3.0, b=1.0),
    "steps too long": Case("stiff", "decay", t1=10.0, dt0=0.01, constant=True),
    # 9: too few steps
    "long": Case("too_few_steps", t1=2e4),
    "fast": Case("too_few_steps", "fast oscillator", t1=10.0),
    "chirp": Case("too_few_steps", "chirp", t1=200.0),
    "ringing": Case("too_few_steps", "ringing", t1=10.0),
    "long, constant": Case("too_few_steps", t1=20.0, constant=True),
    # none of these
    "sliding": Case("jump", "sliding", t1=2.0),
    "sliding, loose": Case("jump", "sliding", t1=20.0, rtol=1e-3, atol=1e-6),
    # no failure
    "healthy": Case(None, t1=5.0),
    "healthy, constant": Case(None, constant=True),
    "healthy, no time": Case(None, t1=0.0),
    "healthy, nearly stiff": Case(None, "decay", t1=1.0),
    "healthy, overflow in trial steps": Case(None, "steep", a=(0.0, 1.0), t1=10.0, dt0=100.0),
    "healthy, flame": Case(None, "flame", a=(1e-3, 1e-2), t1=2000.0),
    "healthy, grows": Case(None, "square", t1=0.999),
}


def vector_field(t, y, args):
    branches = [lambda t, a, b, f=f: f(t, a, b) for f in FIELDS.values()]
    sign = args["sign"]
    da, db = jax.lax.switch(args["kind"], branches, sign.astype(t.dtype) * t, y["a"], y["b"])
    return {"a": sign * da, "b": sign * db}


def problem(case: Case, dtype: Any, sign: int) -> tuple[tuple, dict]:
    """The arguments of `diffeqsolve`."""
    kind = jnp.asarray(NAMES.index(case.field))
    args = {"kind": kind, "sign": jnp.asarray(sign, dtype)}
    y0 = {"a": jnp.asarray(case.a, dtype), "b": jnp.asarray(case.b, dtype)}
    t0, t1, dt0 = (jnp.asarray(sign * t, dtype) for t in (case.t0, case.t1, case.dt0))
    controller = (
        dfx.ConstantStepSize() if case.constant else dfx.PIDController(case.rtol, case.atol)
    )
    return (dfx.ODETerm(vector_field), dfx.Tsit5(), t0, t1, dt0, y0, args), {
        "stepsize_controller": controller,
        "max_steps": 4096,
    }
