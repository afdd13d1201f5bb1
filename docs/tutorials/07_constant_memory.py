# %% [markdown]
# # Gradients in constant memory
#
# Reverse mode needs the states of the forward pass. It can store them all, store some and repeat the steps
# between them (*checkpoints*), or undo the steps (*reversible solvers*). Numbers below are what the compiler
# reserves for one gradient; nothing has to run for them.

# %%
import diffrax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from nde.solvers import EES27, DiscreteAdjoint, ReversibleAdjoint

WIDTH = 4096


def gradient(solver, adjoint, steps):
    def loss(y0):
        field = diffrax.ODETerm(lambda t, y, args: jnp.sin(jnp.roll(y, 1)) - y)
        solution = diffrax.diffeqsolve(
            field, solver, 0.0, 1.0, 1.0 / steps, y0, adjoint=adjoint, max_steps=steps + 1
        )
        return jnp.sum(solution.ys[-1] ** 2)

    return jax.jit(jax.grad(loss))


def kilobytes(solver, adjoint, steps):
    compiled = gradient(solver, adjoint, steps).lower(jnp.ones(WIDTH)).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1024


# %% [markdown]
# ## Memory against steps
#
# The state has 4096 entries. Tsit5 is differentiated with 16 checkpoints and with all steps stored; EES27
# is un-stepped.

# %%
STEPS = (50, 200, 800)
methods = {
    "store all": (diffrax.Tsit5(), lambda steps: DiscreteAdjoint(checkpoints=steps)),
    "16 checkpoints": (diffrax.Tsit5(), lambda steps: DiscreteAdjoint(checkpoints=16)),
    "un-step": (EES27(), lambda steps: ReversibleAdjoint(checkpoint_every=None)),
}
used = {
    name: [kilobytes(solver, make(steps), steps) for steps in STEPS]
    for name, (solver, make) in methods.items()
}
print(f"{'steps':<16}" + "".join(f"{steps:>8}" for steps in STEPS))
for name, row in used.items():
    print(f"{name:<16}" + "".join(f"{value:>8.0f}" for value in row) + "  KiB")
assert used["store all"][-1] > 5 * used["store all"][0]
assert all(used[name][-1] < 1.2 * used[name][0] for name in ("16 checkpoints", "un-step"))

fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
for name, row in used.items():
    ax.loglog(STEPS, row, marker="o", label=name)
ax.set(xlabel="steps", ylabel="KiB", title="memory of a gradient")
ax.legend(frameon=False)

# %% [markdown]
# ## The price
#
# Checkpoints repeat steps; un-stepping evaluates the field again and loses digits where it contracts. This
# field does contract; `drift`, in units of $1 + |y|$, says by how much the states that were un-stepped
# differ from those that were passed. With `checkpoint_every` left at its default, states are restored now
# and then.

# %%
exact = gradient(EES27(), DiscreteAdjoint(), 200)(jnp.ones(WIDTH))
undone = gradient(EES27(), ReversibleAdjoint(), 200)(jnp.ones(WIDTH))
difference = float(jnp.abs(undone - exact).max() / jnp.abs(exact).max())
print(f"relative difference of the gradients: {difference:.1e}")
assert difference < 1e-3

# %% [markdown]
# Which adjoint to take: [Choosing](../choosing.md). When to trust a reversal:
# [Reversible solvers](../api/reversible.md).
