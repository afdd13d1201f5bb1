"""What `import nde` gives, and what it does not load."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nde


def test_import_is_light_and_the_rest_comes_on_demand():
    program = (
        "import sys, nde\n"
        "heavy = {'optax', 'matplotlib', 'tqdm', 'scipy.optimize'} & set(sys.modules)\n"
        "print(sorted(heavy), 'nde.train' in sys.modules, 'nde.plot' in sys.modules)\n"
        "nde.fit, nde.train.multi_start\n"
        "print('optax' in sys.modules, 'matplotlib' in sys.modules)\n"
        "nde.plot.loss\n"
        "print('matplotlib' in sys.modules)\n"
        # A backend that runs cannot be told how many devices or processes there are.
        "import jax\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        "print(jax.device_count())\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout
    assert out.splitlines() == ["[] False False", "True False", "True", "3"]


def test_every_public_name_is_there_and_no_other():
    assert set(nde.__all__) <= set(dir(nde))
    assert all(getattr(nde, name) is not None for name in nde.__all__)
    with pytest.raises(AttributeError, match="no attribute 'NeuralOED'"):
        _ = nde.NeuralOED


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert nde.__version__ == project["version"]
