"""What `ReversibleAdjoint` costs, in evaluations and memory, and what it refuses."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import PARAMS, Y0, solve, weigh
from reversibles import SOLVERS

from nde.solvers import Reversible, ReversibleAdjoint, ReversibleHeun


class Counter:
    """Evaluations and transposes that a compiled call makes. Dead ones are compiled away."""

    def __init__(self):
        self.evaluations = self.transposes = 0

        def tick(name):
            def add(x):
                setattr(self, name, getattr(self, name) + 1)
                return np.zeros_like(x)

            return lambda x: x + jax.pure_callback(add, jax.typeof(x), x, vmap_method="expand_dims")

        evaluated, transposed = tick("evaluations"), tick("transposes")

        @jax.custom_vjp
        def counted(y, w):
            return evaluated(jnp.tanh(w @ y))

        def forwards(y, w):
            out = counted(y, w)
            return out, (y, w, out)

        def backwards(kept, ct):
            y, w, out = kept
            ct = transposed(ct * (1.0 - out**2))
            return w.T @ ct, jnp.outer(ct, y)

        counted.defvjp(forwards, backwards)
        self.field = lambda t, y, args: counted(y, args)

    def of(self, run, *args):
        """(evaluations, transposes) of `run(*args)`."""
        self.evaluations = self.transposes = 0
        jax.block_until_ready(run(*args))
        return self.evaluations, self.transposes


def costs(solver, every, steps):
    """(evaluations, transposes) of the solve, and of the gradient."""
    counter = Counter()

    def loss(y, w):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(counter.field), solver, 0.0, 1.0, 1 / steps, y, w, max_steps=steps + 1,
            adjoint=ReversibleAdjoint(every),
        )  # fmt: skip
        return weigh(sol.ys)

    args = (Y0, PARAMS["w"])
    forward = jax.jit(loss).lower(*args).compile()
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*args).compile()
    return counter.of(forward, *args), counter.of(gradient, *args)


def test_evaluations_of_reversible_heun():
    (solve_f, solve_b), (f, b) = costs(ReversibleHeun(), None, 16)
    assert (solve_f, solve_b) == (16 + 1, 0)
    assert (f, b) == (2 * (16 + 1), 16 + 1)


def test_evaluations_of_the_reversible_tsit5():
    (solve_f, solve_b), (f, b) = costs(Reversible(dfx.Tsit5()), None, 16)
    assert (solve_f, solve_b) == (12 * 16, 0)
    assert (f, b) == (2 * 12 * 16, 12 * 16)


def test_only_chunks_that_miss_are_replayed():
    """Midpoint, 64 steps in chunks of 32: 4 F forwards, 4 F + 4 B backwards; and, where the reversal
    is lost, 31 steps replayed and 32 pulled back once more."""
    held, lost = Reversible(dfx.Midpoint(), 0.999), Reversible(dfx.Midpoint(), 0.5)
    assert costs(held, 32, 64)[1] == (2 * 4 * 64, 4 * 64)
    replayed = 2 * (4 * 31 + 4 * 32)
    assert costs(lost, 32, 64)[1] == (2 * 4 * 64 + replayed, 2 * 4 * 64)


@pytest.mark.parametrize("name", ["ReversibleHeun", "EES27"])
def test_memory_does_not_grow_with_the_steps(name):
    """A state of 4096 numbers: 100 000 of them stored would be 3.3 GB."""
    y0, decay = jnp.ones(4096), jnp.array(0.1)

    def temporary(steps):
        def loss(y, decay):
            sol = dfx.diffeqsolve(
                dfx.ODETerm(lambda t, y, decay: jnp.sin(t) - decay * y), SOLVERS[name], 0.0, 1.0,
                1 / steps, y, decay, adjoint=ReversibleAdjoint(None), max_steps=steps,
            )  # fmt: skip
            return jnp.sum(sol.ys)

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(y0, decay).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    times = 100_000 * y0.dtype.itemsize
    assert temporary(100_000) <= 1.2 * temporary(100) + times


# --- what is refused -----------------------------------------------------------------------------


def test_a_solver_that_cannot_be_undone_is_refused():
    with pytest.raises(TypeError, match="cannot undo the steps of Tsit5") as error:
        solve(adjoint=ReversibleAdjoint())
    for solver in SOLVERS.values():
        assert type(solver).__name__ in str(error.value)
    with pytest.raises(TypeError, match="cannot undo the steps of ReversibleHeun"):
        solve(adjoint=ReversibleAdjoint(), solver=dfx.ReversibleHeun())


LACKING = {
    "event": dict(event=dfx.Event(lambda t, y, args, **kwargs: y[0] - 0.5)),
    "dense": dict(saveat=dfx.SaveAt(dense=True)),
    "progress_meter": dict(progress_meter=dfx.TextProgressMeter()),
}


@pytest.mark.parametrize("what", LACKING)
def test_what_it_does_not_support_is_refused(what):
    with pytest.raises(ValueError, match=rf"does not support `.*{what}.*DiscreteAdjoint"):
        solve(adjoint=ReversibleAdjoint(), solver=ReversibleHeun(), **LACKING[what])


@pytest.mark.parametrize("every", [0, -3])
def test_a_distance_below_one_is_refused(every):
    with pytest.raises(
        ValueError, match=r"`checkpoint_every` is .*; it must be an integer >= 1, or None"
    ):
        ReversibleAdjoint(every)
