"""Bad input to the options of `fit`, to `save` and to `load`: every message says what is wrong with what.

The arguments that every run has are in tests/models/test_bad_input.py.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from least_squares import DATA, KEY, START, fit, squares
from messages import mentions

import nde
from nde.train import (
    Average,
    JSONLines,
    NonFiniteError,
    Ragged,
    Stage,
    Turn,
    Validation,
    multi_start,
)

SGD = optax.sgd(0.1)
SERIES = [(np.arange(3.0), np.ones((3, 1))), (np.arange(4.0), np.ones((4, 1)))]
HOLE = (DATA[0], DATA[1].at[0].set(jnp.inf))
TWO = [Turn(squares, SGD, lambda m: m["w"]), Turn(squares, SGD, lambda m: m["scale"])]


def turns(*args, **options):
    return nde.fit(START, *args, steps=1, key=KEY, progress=False, **options)


OPTIONS = [
    (lambda: Stage(-1), ["`steps` is -1", ">= 0"]),
    (lambda: Stage(1.5), ["`steps` is 1.5"]),
    (lambda: Stage(1, horizon=0.0), ["`horizon` is 0.0", "(0, 1]"]),
    (lambda: Stage(1, horizon=2), ["`horizon` is 2", "(0, 1]"]),
    (lambda: Stage(1, horizon="all"), ["`horizon` is 'all'", "finite number"]),
    (lambda: Stage(1, rate=-1.0), ["`rate` is -1.0", ">= 0"]),
    (lambda: Stage(1, rate=np.nan), ["`rate` is nan"]),
    (lambda: Stage(1, frozen="w"), ["`frozen` is 'w'", "(model)"]),
    (lambda: Stage(1, weights=0.1), ["`weights` is 0.1", "by name"]),
    (lambda: Stage(1, weights={"a": None}), ["`weights['a']` is None"]),
    (lambda: fit(START, steps=[]), ["`steps` is []", "Stage"]),
    (lambda: fit(START, steps=[100, 200]), ["`steps` is [100, 200]", "Stage(500"]),
    (lambda: fit(START, steps="many"), ["`steps` is 'many'"]),
    (
        lambda: fit(START, steps=[Stage(1, weights={"a": 1.0}), Stage(1)]),
        ["stage 0 are ['a']", "stage 1 are []", "0.0 where a term is off"],
    ),
    (lambda: fit(START, steps=[Stage(1, frozen=lambda m: m["v"])]), ["`frozen` raised KeyError"]),
    (lambda: Turn(None, SGD, lambda m: m), ["`loss` is None", "(model, batch, key)"]),
    (lambda: Turn(squares, 0.1, lambda m: m), ["`optim` is 0.1", "optax.adam(1e-3)"]),
    (lambda: Turn(squares, SGD, "w"), ["`trains` is 'w'", "(model)"]),
    (lambda: Turn(squares, SGD, lambda m: m, steps=0), ["`steps` is 0", ">= 1"]),
    (lambda: turns([], DATA), ["`loss` is []", "Turn"]),
    (lambda: turns([squares, squares], DATA), ["`loss` is [", "Turn(loss, optim, trains)"]),
    (lambda: turns(TWO, DATA, optim=SGD), ["`optim` was given", "every `Turn` has its own"]),
    (lambda: turns(squares, DATA), ["`optim` is None", "optax.adam(1e-3)"]),
    (
        lambda: turns([Turn(squares, SGD, lambda m: m["v"])], DATA),
        ["`trains` raised KeyError", "nodes"],
    ),
    (
        lambda: turns(TWO, DATA, frozen=lambda m: m["scale"]),
        ["`trains` of turn 1 gives nothing that is trained"],
    ),
    (lambda: turns(TWO, DATA, validation=Validation(DATA)), ["`validation` has no loss"]),
    (lambda: Validation(DATA, every=0), ["`every` is 0", ">= 1"]),
    (lambda: Validation(DATA, patience=0), ["`patience` is 0"]),
    (lambda: Validation(DATA, batch_size=0), ["`batch_size` is 0"]),
    (lambda: Validation(DATA, loss=3), ["`loss` is 3"]),
    (lambda: fit(START, validation=DATA), ["`validation` is (", "nde.train.Validation(data"]),
    (lambda: fit(START, validation=Validation(())), ["data of `validation`", "no array"]),
    (lambda: fit(START, validation=Validation(HOLE)), ["data of `validation`", "`data[1]` is infinite"]),
    (lambda: Average(decay=1.0), ["`decay` is 1.0", "[0, 1)"]),
    (lambda: Average(decay="slow"), ["`decay` is 'slow'"]),
    (lambda: Average(start=-1), ["`start` is -1"]),
    (lambda: Average(every=0), ["`every` is 0"]),
    (lambda: fit(START, average=0.99), ["`average` is 0.99", "Average(decay=0.999)"]),
    (lambda: fit(START, project=1), ["`project` is 1", "(model)"]),
    (lambda: fit(START, project=lambda m: m["w"]), ["`project` returned f64[3]", "tree_at"]),
    (
        lambda: fit(START, project=lambda m: m | {"w": m["w"][:2]}),
        ["`project` gave `model['w']` the shape (2,)", "(3,)"],
    ),
    (lambda: fit(START, accumulate=0), ["`accumulate` is 0", ">= 1"]),
    (lambda: fit(START, checkpoint="run", every=0), ["`every` is 0"]),
    (lambda: fit(START, callbacks=3), ["`callbacks` is 3", "a list"]),
    (lambda: fit(START, callbacks=[lambda: None]), ["`callbacks` has signature ()", "(numbers)"]),
    (lambda: fit(START, mesh="data"), ["`mesh` is 'data'", "jax.make_mesh"]),
    (lambda: fit(START, data=Ragged(SERIES), batch_size=3), ["`batch_size` is 3", "2 series"]),
    (lambda: fit(START, lambda m, b, k: (m["w"][0], {"weight": m["w"]})), ["'weight'", "scalar"]),
    (lambda: Ragged(SERIES, 0), ["`buckets` is 0", ">= 1"]),
    (
        lambda: multi_start(lambda k: START, squares, DATA, starts=2, steps=1, optim=SGD, key=3),
        ["`key` is 3"],
    ),
    (lambda: nde.losses.trajectory(None, nde.train.Batch(SERIES[0]), KEY), ["`batch.data`"]),
]  # fmt: skip


@pytest.mark.parametrize("call, fragments", OPTIONS)
def test_an_option_says_what_is_wrong(call, fragments):
    with pytest.raises((ValueError, NonFiniteError), match=mentions(fragments)):
        call()


FILES = [
    (lambda p: fit(START, checkpoint=p / "no" / "run"), FileNotFoundError, ["`checkpoint`", "no'"]),
    (lambda p: fit(START, checkpoint=p), IsADirectoryError, ["`checkpoint`", "a folder"]),
    (lambda p: nde.load(p / "nothing"), FileNotFoundError, ["nothing"]),
    (lambda p: nde.load(p), OSError, [""]),
    (lambda p: nde.save(p, START), OSError, [""]),
]


@pytest.mark.parametrize("call, kind, fragments", FILES)
def test_a_file_says_what_is_wrong(call, kind, fragments, tmp_path):
    with pytest.raises(kind, match=mentions(fragments)):
        call(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="`checkpoint`"):
        fit(START, checkpoint=tmp_path / "run")


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="learning_rate"):
        multi_start(lambda k: START, squares, DATA, starts=1, steps=1, key=KEY, learning_rate=1.0)


def test_a_log_that_cannot_be_written_ends_with_the_model(tmp_path):
    with pytest.raises(OSError) as caught:
        fit(START, steps=3, callbacks=JSONLines(tmp_path / "no" / "log"))
    assert jax.tree.structure(caught.value.model) == jax.tree.structure(START)
