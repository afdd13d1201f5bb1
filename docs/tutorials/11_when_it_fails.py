# %% [markdown]
# # When a solve fails
#
# A failed solve is first a value, `solution.result`, then an exception that says why and what to do.

# %%
import diffrax
import jax
import jax.numpy as jnp

import nde
from nde.solvers import DiscreteAdjoint, SolveError, diagnose

jax.config.update("jax_enable_x64", True)

# %% [markdown]
# ## A model that is called
#
# Outside of `jax.jit`, `jax.vmap` and `jax.grad` a model raises a `SolveError`. The Van der Pol oscillator
# $x'' = \mu (1 - x^2) x' - x$ is stiff for large $\mu$.

# %%
MU = 1000.0


def van_der_pol(t, y, args):
    return jnp.stack([y[1], MU * (1 - y[0] ** 2) * y[1] - y[0]])


ts, y0 = jnp.array([0.0, 1000.0]), jnp.array([2.0, 0.0])
try:
    nde.NeuralODE(van_der_pol)(ts, y0)
    raise AssertionError("an explicit solver should not reach the end")
except SolveError as error:
    print(error)

# %% [markdown]
# It names a cause, the time and a remedy. The remedy works:

# %%
solution = nde.NeuralODE(van_der_pol, solver=diffrax.Kvaerno5()).solve(ts, y0)
print("steps:", int(solution.stats["num_steps"]))
assert solution.result == diffrax.RESULTS.successful

# %% [markdown]
# ## A solve of your own
#
# `diagnose` takes what `diffrax.diffeqsolve` took. The solution of $y' = y^2$, $y(0) = 1$ is $1 / (1 - t)$,
# which leaves every bound at $t = 1$.

# %%
square = diffrax.ODETerm(lambda t, y, args: y**2)
problem = (square, diffrax.Tsit5(), 0.0, 2.0, None, jnp.array(1.0))
options = dict(stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-9))
solution = diffrax.diffeqsolve(*problem, **options, adjoint=DiscreteAdjoint(), throw=False)
assert solution.result != diffrax.RESULTS.successful
found = diagnose(*problem, **options)
print(found.cause)
print(found.message)
assert found.cause == "blow_up"

# %% [markdown]
# ## One of a batch
#
# In a batch nothing is raised with `throw=False`; `result` has one entry per example. Find the one that
# failed and give it to `diagnose`.

# %%
y0s = jnp.array([0.2, 0.4, 1.0])
solve = lambda y0: diffrax.diffeqsolve(
    *problem[:5], y0, **options, adjoint=DiscreteAdjoint(), throw=False
)
failed = jax.vmap(solve)(y0s).result != diffrax.RESULTS.successful
print(failed)
assert failed.tolist() == [False, False, True]

# %% [markdown]
# The causes and what each is told from: [Failed solves](../api/failures.md). `nde.fit` leaves out an update that
# is not finite and stops when many are: [It does not train](../does_not_train.md).
