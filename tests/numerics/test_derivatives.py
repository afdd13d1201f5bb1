"""Derivatives of every kind through both adjoints, against diffrax's `DirectAdjoint` on the same steps."""

import functools as ft

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import CONSTANT, relative, weigh
from sweeps import sweep

from nde.solvers import DiscreteAdjoint, ReversibleAdjoint, ReversibleHeun
from nde.solvers.lanes import primitives

DIRECT = dfx.DirectAdjoint()
PID = dfx.PIDController(rtol=1e-3, atol=1e-5)
WAYS = {
    "explicit": (DiscreteAdjoint(), dfx.Heun(), CONSTANT),
    "adaptive": (DiscreteAdjoint(), dfx.Bosh3(), PID),
    "implicit": (DiscreteAdjoint(), dfx.Kvaerno3(), dfx.PIDController(rtol=1e-8, atol=1e-10)),
    "reversible": (ReversibleAdjoint(), ReversibleHeun(), CONSTANT),
    "noise": (DiscreteAdjoint(), dfx.Heun(), CONSTANT),
    "state": (DiscreteAdjoint(), dfx.ReversibleHeun(), CONSTANT),
}
NEAR = {"implicit": 1e-6}  # the roots of a step are known to a tolerance
QUICK = ("adaptive", "reversible", "state")
A, Y0 = jnp.asarray(1.3), jnp.array([1.0, 0.5])
TIMES = (jnp.asarray(0.0), jnp.asarray(1.0), jnp.asarray(0.25), jnp.array([0.3, 0.9]))


def field(t, y, a):
    return a * jnp.sin(y * jnp.cos(3 * t))


def run(adjoint, way, a, y, t0=0.0, t1=1.0, dt0=0.25, ts=TIMES[3], controller=None):
    _, solver, default = WAYS[way]
    terms = dfx.ODETerm(field)
    if way == "noise":
        path = dfx.VirtualBrownianTree(0.0, 1.0, 2**-6, (), jax.random.key(0))
        terms = dfx.MultiTerm(terms, dfx.ControlTerm(lambda t, y, a: 0.3 * jnp.cos(a * y), path))
    return dfx.diffeqsolve(
        terms, solver, t0, t1, dt0, y, a, adjoint=adjoint, max_steps=512 if way == "implicit" else 64,
        stepsize_controller=controller or default, saveat=dfx.SaveAt(ts=ts, t1=True),
    ).ys  # fmt: skip


def both(way, fn, *args):
    """What `fn` gives with our adjoint and with `DirectAdjoint`."""
    return [jax.jit(ft.partial(fn, adjoint))(*args) for adjoint in (WAYS[way][0], DIRECT)]


@pytest.mark.parametrize("way", sweep(WAYS, *QUICK))
def test_forward_mode(way):
    """Of a batch, and of its gradient: a Jacobian, and the Hessian's product with a vector."""
    ys = jnp.stack([Y0, -Y0])

    def derivatives(adjoint, a, ys):
        one = lambda a, y: run(adjoint, way, a, y)
        jacobian = jax.vmap(jax.jacfwd(one), in_axes=(None, 0))(a, ys)
        total = lambda a, ys: weigh(jax.vmap(one, in_axes=(None, 0))(a, ys))
        product = jax.jvp(jax.grad(total, argnums=(0, 1)), (a, ys), (a, jnp.cos(ys)))
        return jacobian, product

    assert relative(*both(way, derivatives, A, ys)) < NEAR.get(way, 1e-10)


@pytest.mark.parametrize("way", sweep(["explicit", "adaptive", "reversible"], "explicit"))
def test_times(way):
    """Start, end, first step and save times of two lanes: grad(vmap) and vmap(grad)."""
    lanes = [jnp.stack([x, x + 0.1]) for x in TIMES]

    def derivatives(adjoint, a, *times):
        loss = lambda a, *times: weigh(run(adjoint, way, a, Y0, *times))
        summed = lambda a, *times: jnp.sum(jax.vmap(ft.partial(loss, a))(*times))
        each = jax.grad(loss, argnums=range(5))
        together = jax.grad(summed, argnums=range(5))(a, *times)
        return together, jax.vmap(each, in_axes=(None, 0, 0, 0, 0))(a, *times)

    ours, theirs = both(way, derivatives, A, *lanes)
    assert relative(ours, theirs) < 1e-10
    assert all(jnp.any(x != 0) for x in ours[0])


@pytest.mark.parametrize("way", ["explicit", "adaptive"])
def test_only_what_moves_times_takes_tangents(way, monkeypatch):
    """One pass for each entry is for few numbers: never for a state or a parameter."""
    seen = []
    monkeypatch.setattr(primitives, "_by_tangents", lambda *args: seen.append(args) or 1 / 0)
    lowered = jax.jit(jax.grad(lambda a, y: weigh(run(WAYS[way][0], way, a, y)), argnums=(0, 1)))
    lowered.lower(A, Y0)
    assert not seen
    with pytest.raises(ZeroDivisionError):
        jax.jit(jax.grad(lambda t1: weigh(run(WAYS[way][0], way, A, Y0, t1=t1)))).lower(1.0)


def test_a_time_of_a_dose():
    """The steps meet it, and the field knows it."""

    def loss(adjoint, dose):
        clip = dfx.ClipStepSizeController(PID, jump_ts=dose[None])
        dosed = lambda t, y, a: jnp.where(t < dose, 1.0, -1.0) * y + dose
        return dfx.diffeqsolve(
            dfx.ODETerm(dosed), dfx.Bosh3(), 0.0, 1.0, 0.1, jnp.asarray(1.0), adjoint=adjoint,
            stepsize_controller=clip, max_steps=64,
        ).ys[0]  # fmt: skip

    derivative = lambda adjoint, dose: jax.grad(ft.partial(loss, adjoint))(dose)
    assert relative(*both("adaptive", derivative, jnp.asarray(0.37))) < 1e-10


HAMILTONIAN = jnp.array([[1.0, 0.5 - 0.2j], [0.5 + 0.2j, -0.7]])
LOWERING = jnp.array([[0.0, 1.0], [0.0, 0.0]], HAMILTONIAN.dtype)


def schroedinger(t, psi, a):
    return -1j * (a * jnp.cos(t)).astype(psi.dtype) * (HAMILTONIAN @ psi)


def lindblad(t, rho, a):
    h, down = a.astype(rho.dtype) * HAMILTONIAN, LOWERING
    up = down.conj().T
    return -1j * (h @ rho - rho @ h) + down @ rho @ up - 0.5 * (up @ down @ rho + rho @ up @ down)


QUANTUM = {
    "schroedinger": (schroedinger, jnp.array([0.6, 0.8j])),
    "lindblad": (lindblad, jnp.array([[0.36, -0.48j], [0.48j, 0.64]])),
}


@pytest.mark.filterwarnings("ignore:Complex dtype support in Diffrax")
@pytest.mark.parametrize(
    "equation, way",
    sweep(
        [(e, w) for e in QUANTUM for w in ("explicit", "adaptive", "reversible")],
        ("schroedinger", "reversible"),
        ("lindblad", "adaptive"),
    ),
)
def test_complex_states(equation, way):
    vector_field, y0 = QUANTUM[equation]
    _, solver, controller = WAYS[way]

    def value_and_gradient(adjoint, a, y0):
        def loss(a, y0):
            ys = dfx.diffeqsolve(
                dfx.ODETerm(vector_field), solver, 0.0, 1.0, 0.1, y0, a, adjoint=adjoint,
                stepsize_controller=controller, saveat=dfx.SaveAt(ts=TIMES[3]), max_steps=64,
            ).ys  # fmt: skip
            return weigh(ys.real) + weigh(jnp.sin(ys.imag)) + jnp.sum(jnp.abs(ys) ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1))(a, y0)

    assert relative(*both(way, value_and_gradient, A, y0)) < 1e-10


MEMORY = {
    "discrete, constant": ("explicit", DiscreteAdjoint()),
    "discrete, adaptive": ("adaptive", DiscreteAdjoint()),
    "reversible": ("reversible", ReversibleAdjoint()),
    "reversible, no states": ("reversible", ReversibleAdjoint(checkpoint_every=None)),
}


@pytest.mark.parametrize("name", sweep(MEMORY, "discrete, adaptive", "reversible, no states"))
def test_memory_does_not_depend_on_max_steps(name):
    way, adjoint = MEMORY[name]
    _, solver, controller = WAYS[way]

    def temporary(max_steps):
        def loss(a, ys):
            solve = lambda y: dfx.diffeqsolve(
                dfx.ODETerm(field), solver, 0.0, 1.0, 0.1, y, a, adjoint=adjoint,
                stepsize_controller=controller, max_steps=max_steps,
            ).ys  # fmt: skip
            return jnp.sum(jax.vmap(solve)(ys))

        compiled = jax.jit(jax.grad(loss)).lower(A, jnp.ones((8, 16))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporary(2**12), temporary(2**22)
    assert many < 1.1 * few


# --- what is handed over, and what is said -------------------------------------------------------


def test_no_tracer_leaks():
    with jax.checking_leaks():
        jax.jit(jax.grad(lambda a: jnp.sum(run(DiscreteAdjoint(), "explicit", a, Y0))))(A)


def test_a_collective_over_the_lanes():
    """Handed to diffrax's own loop."""
    drift = lambda t, y, args: -(y - jax.lax.pmean(y, "lanes"))
    solve = lambda y, adjoint: (
        dfx.diffeqsolve(dfx.ODETerm(drift), dfx.Heun(), 0.0, 1.0, 0.25, y, adjoint=adjoint).ys
    )
    lanes = jnp.array([1.0, 2.0, 3.0])
    run = lambda adjoint: jax.vmap(ft.partial(solve, adjoint=adjoint), axis_name="lanes")(lanes)
    assert relative(run(DiscreteAdjoint()), run(dfx.RecursiveCheckpointAdjoint())) < 1e-12


def test_ordered_callbacks(capfd):
    def loud(t, y, a):
        jax.debug.print("t={}", t, ordered=True)
        return -a * y

    solve = lambda a: dfx.diffeqsolve(
        dfx.ODETerm(loud), dfx.Euler(), 0.0, 1.0, 0.5, 1.0, a, adjoint=DiscreteAdjoint()
    ).ys[0]
    np.testing.assert_allclose(solve(0.5), 0.75**2, rtol=1e-12)
    jax.effects_barrier()
    assert capfd.readouterr().out.split() == ["t=0.0", "t=0.5"]


def test_shard_map_says_what_it_needs():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    one = lambda y: run(DiscreteAdjoint(), "explicit", A, y)
    sharded = jax.shard_map(jax.vmap(one), mesh=mesh, in_specs=spec, out_specs=spec)
    with pytest.raises(ValueError, match="`nde` .* `check_vma=True`.*check_vma=False"):
        jax.jit(sharded)(jnp.ones((2, 2)))
