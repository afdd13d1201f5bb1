"""Where the reversible solvers are stable, forwards and backwards, and where they are not."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import PROBLEMS, terms
from reversibles import RK4, there_and_back

from nde.solvers.reversible.coupling import StepInput
from nde.solvers.reversible.ees import EES25, EES27
from nde.solvers.reversible.leapfrog import AsynchronousLeapfrog
from nde.solvers.reversible.mccallum_foster import Reversible
from nde.solvers.reversible.reversible_heun import ReversibleHeun
from nde.solvers.reversible.symplectic import StormerVerlet, Yoshida4

# --- dissipative fields --------------------------------------------------------------------------


# `numerics.md` 3.1: y' = -a y + sin t + tanh(y)/2, h = 0.01: y(T), and how far y(0) came back, in
# float64. Entries that are rounding alone are the median over many starts of a naive loop.
MILD, LONG, STRONG = (1.0, 500), (1.0, 2000), (5.0, 500)
TRUE = {MILD: -0.5655, LONG: 0.0819, STRONG: -0.2161}
TABLE = {
    "EES25": {MILD: 5e-12, LONG: 1e-8, STRONG: 6e-2},
    "EES27": {MILD: 2e-14, LONG: 4e-10, STRONG: 3e-6},
    "Reversible(RK4, .999)": {MILD: 1e-13, LONG: 9e-10, STRONG: 6e-7},
    "Reversible(RK4, .99)": {MILD: 1e-13, LONG: 3e-10, STRONG: 2e-7},
    "Reversible(RK4, .9)": {MILD: 1e5, LONG: 1e66, STRONG: 4e-3},
    "Reversible(Midpoint, .999)": {MILD: 1e-13, LONG: 9e-10, STRONG: 3e-1},
    "ReversibleHeun": {MILD: 3e-14, LONG: 2e-9, STRONG: 3e-1},
    "ALF": {MILD: 1e-14, LONG: 1e-9, STRONG: 3.0},
}
# Where the forward map itself is unstable: what it returns instead of the truth.
WRONG = {
    ("Reversible(RK4, .999)", STRONG): 2.81,
    ("Reversible(RK4, .99)", STRONG): -0.186,
    ("Reversible(Midpoint, .999)", LONG): 0.087,
    ("Reversible(Midpoint, .999)", STRONG): 7.43e4,
    ("ReversibleHeun", LONG): 0.253,
    ("ReversibleHeun", STRONG): -1.1e4,
    ("ALF", STRONG): -7.4e3,
}
IN_TABLE = {
    "EES25": EES25(),
    "EES27": EES27(),
    "Reversible(RK4, .999)": Reversible(RK4(), 0.999),
    "Reversible(RK4, .99)": Reversible(RK4(), 0.99),
    "Reversible(RK4, .9)": Reversible(RK4(), 0.9),
    "Reversible(Midpoint, .999)": Reversible(diffrax.Midpoint(), 0.999),
    "ReversibleHeun": ReversibleHeun(),
    "ALF": AsynchronousLeapfrog(),
}


@pytest.mark.parametrize("name", TABLE)
def test_stability_on_dissipative_fields(name):
    """What works works, and what is unstable is unstable, forwards and backwards."""
    weak, strong = PROBLEMS["weak dissipation"], PROBLEMS["strong dissipation"]
    for (a, steps), lost in TABLE[name].items():
        problem = (strong if a == 5.0 else weak)._replace(t1=0.01 * steps)
        end, back = there_and_back(IN_TABLE[name], problem, steps)
        case = (a, steps)
        expected = WRONG.get((name, case), TRUE[case])
        assert abs(end - expected) < 0.05 * abs(expected)
        if (name, case) in WRONG:
            assert abs(end - TRUE[case]) > 0.05 * abs(TRUE[case])
        error = float(abs(back - 1.0))
        assert error < 30 * lost
        if lost > 1e-3:  # the reversal is lost, and has to be seen to be
            assert error > lost / 30


# --- linear stability ----------------------------------------------------------------------------


def spectral_radius(solver, s):
    """The largest eigenvalue of one step of y' = lambda y, for each s = h lambda."""
    size = len(
        solver.initial_members(diffrax.ODETerm(lambda t, y, args: y), 0.0, jnp.ones(()), None)
    )

    @jax.jit
    @jax.vmap
    def matrix(s):
        term = diffrax.ODETerm(lambda t, y, args: s * y)
        step = StepInput.over(term, 0.0, 1.0, None)
        units = jnp.eye(size, dtype=s.dtype)
        columns = [jnp.stack(solver.forward(step, tuple(e))[0]) for e in units]
        return jnp.stack(columns, axis=1)

    return np.max(np.abs(np.linalg.eigvals(matrix(jnp.asarray(s, jnp.complex128)))), axis=1)


def first_unstable(solver, direction, until: float):
    sizes = np.linspace(1e-4, until, 20000)
    unstable = spectral_radius(solver, direction * sizes) > 1 + 1e-9
    return sizes[np.argmax(unstable)] if unstable.any() else until


def test_reversible_heun_is_stable_on_the_imaginary_segment_alone():
    np.testing.assert_allclose(
        spectral_radius(ReversibleHeun(), [-0.1, -0.5]), [1.10499, 1.61803], rtol=1e-5
    )
    assert first_unstable(ReversibleHeun(), 1j, 1.5) == pytest.approx(1.0, abs=1e-3)
    assert first_unstable(AsynchronousLeapfrog(), 1j, 1.5) == pytest.approx(1.0, abs=1e-3)
    assert first_unstable(AsynchronousLeapfrog(), -1.0, 1.5) < 2e-4


def test_leapfrog_eigenvalues():
    s = np.array([-0.3, -0.1 + 0.4j, 0.2j])
    root = np.sqrt(1 + s**2 + 0j)
    found, both = spectral_radius(AsynchronousLeapfrog(), s), np.abs([s + root, s - root])
    np.testing.assert_allclose(found, both.max(axis=0), rtol=1e-12)


@pytest.mark.parametrize(
    "base, limits",
    [
        (diffrax.Midpoint(), {0.99: 0.0101, 0.9: 0.1056, 0.5: 2.157}),
        (diffrax.Bosh3(), {0.99: 0.0101, 0.9: 0.1054, 0.5: 0.678}),
        (RK4(), {0.99: 0.0101, 0.9: 0.1054, 0.5: 0.696}),
    ],
)
def test_real_stability_limit_of_the_reversible_construction(base, limits):
    for coupling, limit in limits.items():
        found = first_unstable(Reversible(base, coupling), -1.0, 2.5)
        assert found == pytest.approx(limit, rel=1e-2)


@pytest.mark.parametrize("solver, limit", [(StormerVerlet(), 2.0), (Yoshida4(), 1.57)])
def test_oscillator_stability_limit_of_the_symplectic_methods(solver, limit):
    velocity = diffrax.ODETerm(lambda t, p, args: p)

    def radius(omega):
        force = diffrax.ODETerm(lambda t, q, args: -(omega**2) * q)
        step = StepInput.over((velocity, force), 0.0, 1.0, None)
        columns = [jnp.stack(solver.forward(step, tuple(e))[0]) for e in jnp.eye(2)]
        return jnp.stack(columns, axis=1)

    sizes = np.linspace(0.01, 2.1, 2000)
    radii = np.max(np.abs(np.linalg.eigvals(jax.jit(jax.vmap(radius))(sizes))), axis=1)
    assert sizes[np.argmax(radii > 1 + 1e-6)] == pytest.approx(limit, abs=0.01)


def test_symplectic_methods_keep_the_energy_of_kepler():
    """No secular drift over 50 orbits."""
    problem = PROBLEMS["kepler"]
    ts = jnp.linspace(0.0, 300.0, 1000)
    for solver, bound in ((StormerVerlet(), 1e-2), (Yoshida4(), 1e-3)):
        sol = diffrax.diffeqsolve(
            terms(problem),
            solver,
            0.0,
            300.0,
            0.05,
            problem.y0,
            problem.params,
            saveat=diffrax.SaveAt(steps=True),
            max_steps=6001,
        )
        q, p = sol.ys
        energy = jnp.sum(p**2, axis=1) / 2 - 1 / jnp.sqrt(jnp.sum(q**2, axis=1))
        energy = energy[jnp.isfinite(energy)]
        assert len(energy) >= len(ts)
        assert jnp.max(jnp.abs(energy - energy[0])) < bound
