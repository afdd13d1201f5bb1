"""Strict numerics for every test: float64 on, no silent promotion, two devices on one machine."""

import hypothesis
import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 2)

# Compiling is not slowness, hence no deadline. The default run draws the same examples every time;
# `--hypothesis-profile=slow` looks for new ones.
hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=25, print_blob=True
)
hypothesis.settings.register_profile("slow", deadline=None, max_examples=300, print_blob=True)
hypothesis.settings.load_profile("default")
