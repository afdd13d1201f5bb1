# %% [markdown]
# # Many devices, and a run that is interrupted
#
# A batch is divided over the devices of a mesh: each works on its share, one sum per step adds the
# gradients up, and all devices make the same update. Here the CPU is divided into two devices; with
# several GPUs the next cell needs no first line.

# %%
import pathlib
import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import nde

jax.config.update("jax_num_cpu_devices", 2)  # before anything is computed
jax.config.update("jax_enable_x64", True)
mesh = jax.make_mesh((jax.device_count(),), ("data",))

ts = jnp.linspace(0.0, 1.0, 11)
angle = 2.0 * ts + jnp.arange(16.0)[:, None]
data = (jnp.tile(ts, (16, 1)), jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1))
optim = optax.adam(1e-2)


def run(steps, batch_size=8, **options):
    """The same model, data and key every time."""
    field = nde.fields.MLPField(2, width=16, depth=1, scale=4.0, key=jax.random.key(0))
    return nde.fit(
        nde.NeuralODE(field),
        nde.losses.trajectory,
        data,
        optim=optim,
        steps=steps,
        batch_size=batch_size,
        progress=False,
        key=jax.random.key(1),
        **options,
    )


def distance(a, b):
    """The largest difference of two models."""
    a, b = (jax.tree.leaves(eqx.filter(model, eqx.is_array)) for model in (a, b))
    return max(float(jnp.max(jnp.abs(x - y))) for x, y in zip(a, b, strict=True))


# %% [markdown]
# One device and two give the same model, up to the order in which numbers are added.

# %%
alone, _ = run(60)
divided, history = run(60, mesh=mesh)
print(f"{jax.device_count()} devices, largest difference {distance(alone, divided):.1e}")
assert jax.device_count() == 2 and distance(alone, divided) < 1e-8

# %% [markdown]
# With `checkpoint`, all of the run is written to a file from time to time. Whoever makes the same
# call again continues it. Here the run is interrupted after 35 steps, as by Ctrl-C.

# %%
file = pathlib.Path(tempfile.mkdtemp()) / "run.safetensors"


def interrupt(numbers):
    if numbers["step"] == 35:
        raise KeyboardInterrupt


try:
    run(60, checkpoint=file, every=20, callbacks=interrupt)
except KeyboardInterrupt as stopped:
    print("interrupted; steps recorded:", len(stopped.history["loss"]))
else:
    raise AssertionError("the run was expected to be interrupted")

# %% [markdown]
# The continued run is the run that was never interrupted, bit for bit. What was done between the
# last checkpoint and the interruption is done again.

# %%
continued, history = run(60, checkpoint=file, every=20)
print(f"{len(history['loss'])} steps, largest difference {distance(alone, continued):.1e}")
assert distance(alone, continued) == 0.0

# %% [markdown]
# A call with another model, other data, another batch size or key is refused:

# %%
try:
    run(60, checkpoint=file, every=20, batch_size=4)
except nde.train.CheckpointError as error:
    print(error)
else:
    raise AssertionError("another call was expected to be refused")

# %% [markdown]
# Next: several processes, and what a loss must satisfy to be divided:
# [training](../api/training.md).
