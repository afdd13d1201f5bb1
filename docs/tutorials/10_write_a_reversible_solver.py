# %% [markdown]
# # Write a reversible solver in 15 lines
#
# A reversible step is a list of *couplings*. Each changes one member of the state by a function of another,
# $x_i \leftarrow a x_i + b x_j + G(F(x_j))$ with $a \neq 0$, so it can be undone: $x_j$ has not changed.
# Whoever writes down the list has the step, its inverse and its gradient.
#
# Here it is the leapfrog on two copies $y, z$ of the state (J. Pihajoki, Explicit methods in extended phase
# space for inseparable Hamiltonian problems (2015), [arXiv:1411.3367](https://arxiv.org/abs/1411.3367)):
#
# $$y \leftarrow y + \tfrac{h}{2} f(t_0, z), \qquad z \leftarrow z + h f(t_0 + \tfrac{h}{2}, y), \qquad y \leftarrow y + \tfrac{h}{2} f(t_1, z)$$

# %%
import diffrax
import jax
import jax.numpy as jnp

from nde.solvers import DiscreteAdjoint, ReversibleAdjoint
from nde.solvers.methods.declared import Declared
from nde.solvers.reversible.coupling import Coupling
from nde.solvers.reversible.solver import AbstractKickedSolver, half

jax.config.update("jax_enable_x64", True)
Y, Z = 0, 1

# %% [markdown]
# ## The solver
#
# The last evaluation of a step is the first of the next (`shared_ends`), so a step costs two. The kicks of
# half a step at both ends are what `AbstractKickedSolver` makes the error estimate and the output of.
# `twins`: the second member approximates $y$ too, so their distance is a measure of trust.


# %%
class DoubledLeapfrog(AbstractKickedSolver):
    shared_ends = True
    twins = True
    declared = Declared(2, 2, at_start=1, after_jump=1)

    def order(self, terms):
        return 2

    def initial_members(self, terms, t0, y0, args):
        return y0, y0

    def couplings(self, with_error=False):
        start = lambda step, z: step.terms.vf(step.t0, z, step.args)
        middle = lambda step, y: step.terms.vf(0.5 * (step.t0 + step.t1), y, step.args)
        end = lambda step, z: step.terms.vf(step.t1, z, step.args)
        full = lambda step, v: step.terms.prod(v, step.control)
        return (
            Coupling(Y, Z, field=start, increment=half),
            Coupling(Z, Y, field=middle, increment=full),
            Coupling(Y, Z, field=end, increment=half),
        )


# %% [markdown]
# ## Its order
#
# On the pendulum, halving the step should divide the error by four.

# %%
pendulum = lambda t, y, args: jnp.stack([y[1], -args * jnp.sin(y[0])])
y0 = jnp.array([1.0, 0.0])


def end(strength, steps, solver=DoubledLeapfrog(), adjoint=DiscreteAdjoint()):
    return diffrax.diffeqsolve(
        diffrax.ODETerm(pendulum), solver, 0.0, 4.0, 4.0 / steps, y0, strength, adjoint=adjoint
    )


reference = end(1.0, 400, diffrax.Dopri8()).ys[-1]
errors = [float(jnp.abs(end(1.0, n).ys[-1] - reference).max()) for n in (40, 80, 160)]
print([f"{error:.1e}" for error in errors])
assert all(3.6 < a / b < 4.4 for a, b in zip(errors, errors[1:], strict=False))

# %% [markdown]
# ## Its gradient
#
# `ReversibleAdjoint` un-steps the solve, `DiscreteAdjoint` restarts from stored states. Both differentiate
# the very steps that were taken, so they agree up to rounding.

# %%
gradients = [
    jax.grad(lambda s, adjoint=adjoint: end(s, 200, adjoint=adjoint).ys[-1, 0])(1.0)
    for adjoint in (ReversibleAdjoint(checkpoint_every=None), DiscreteAdjoint())
]
print(f"un-stepped {gradients[0]:.14f}")
print(f"stored     {gradients[1]:.14f}")
assert abs(gradients[0] - gradients[1]) < 1e-11

# %% [markdown]
# ## Whether to trust it
#
# With `certify=True` the solve says how far un-stepping leads away from the states that were passed
# (`drift`) and how far the copies are apart (`split`). The pendulum keeps both small. A decaying field does
# not: the copies part, and no adjoint can mend a forward solve that is wrong.

# %%
stats = end(1.0, 200, adjoint=ReversibleAdjoint(certify=True)).stats
decay = diffrax.diffeqsolve(
    diffrax.ODETerm(lambda t, y, args: -y),
    *(DoubledLeapfrog(), 0.0, 20.0, 0.1, y0),
    adjoint=ReversibleAdjoint(certify=True),
).stats
print(f"pendulum: split {float(stats['split']):.1e}")
print(f"decay:    split {float(decay['split']):.1e}")
assert stats["split"] < 1e-2 < decay["split"]

# %% [markdown]
# [Reversible solvers](../api/reversible.md) compares those of the library.
