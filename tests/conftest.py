"""Strict numerics for every test: float64 on, no silent promotion, two devices on one machine."""

import importlib.metadata
import os
from pathlib import Path

import hypothesis
import jax
import pytest

# Most of a test is spent in the compiler, and what it compiles runs once: an older code generator and
# little optimization nearly halve that. `XLA_FLAGS= python -m pytest` compiles as users do.
# (Versions of XLA differ in their flags, and one that it does not know ends the process.)
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=1"
    )

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


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled():
    """Hardly anything is used by two files, and all of it would take several gigabytes."""
    yield
    jax.clear_caches()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Marks as slow what `slow.txt` names: cases whose kind other cases of the default run show."""
    here = Path(__file__).parent
    slow = set((here / "slow.txt").read_text().splitlines())
    named = {}
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        named.setdefault(name.partition("::")[0], set()).add(name)
        if name in slow:
            item.add_marker(pytest.mark.slow)
    if any("::" in arg for arg in config.args):
        return
    gone = {entry for entry in slow if entry not in named.get(entry.partition("::")[0], {entry})}
    if gone:
        raise pytest.UsageError(f"tests/slow.txt names what is not there: {sorted(gone)}")
