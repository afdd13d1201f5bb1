"""Files of models: what comes back, and what is refused."""

import functools
import hashlib
import json
import os

import diffrax
import equinox as eqx
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import mentions

import nde
from nde._saving import pack, unpack
from nde.train import CheckpointError

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def mlp(width=4, **options):
    return nde.NeuralODE(nde.fields.MLPField(2, width=width, depth=1, key=KEY, **options))


def decay(t, y, p):
    return -p["k"] * y


def hybrid(parameters):
    return nde.HybridODE(decay, None, parameters)


MODELS = [
    mlp(),
    mlp(activation=jnp.tanh),
    nde.LinearCDE(2, 8, 3, key=KEY),
    (mlp(), jnp.zeros(2)),
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_a_model_of_named_parts_is_rebuilt_from_its_file_alone(model, tmp_path):
    path = tmp_path / "model.safetensors"
    nde.save(path, model)
    found = nde.load(path)
    assert eqx.tree_equal(found, model)
    assert jax.tree.structure(found) == jax.tree.structure(model)


TREE = {
    "float": jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32),
    "half": jnp.asarray([1.0, jnp.nan, -0.0], jnp.bfloat16),
    "small": jnp.asarray([1, -8], jnp.int4),
    "eighth": jnp.asarray([0.5], jnp.float8_e4m3fn),
    "complex": jnp.asarray([1.0 - 2.0j]),
    "bool": jnp.asarray([True, False]),
    "empty": jnp.zeros((0, 3)),
    "scalar": jnp.asarray(3, jnp.int32),
    "key": jax.random.key(7),
    "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
    "numpy": np.arange(4, dtype=np.uint16),
    "number": np.float64(1e-300),
    "plain": (1, True, None, "text", 2.5, float("inf"), 1j, [np.dtype("float32")]),
    "partial": functools.partial(jnp.sum, axis=0),
    "solver": diffrax.Heun(),
}


def same(a, b):
    """Bit by bit, nan too."""
    if eqx.is_array(a) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    if eqx.is_array(a):
        a, b = np.asarray(a), np.asarray(b)
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    return type(a) is type(b) and (a == b or callable(a))


def test_every_type_comes_back_bit_for_bit(tmp_path):
    nde.save(tmp_path / "tree", TREE)
    found = nde.load(tmp_path / "tree")
    pairs = zip(
        *(jax.tree.leaves(tree, is_leaf=lambda x: x is None) for tree in (TREE, found)), strict=True
    )
    assert all(same(a, b) for a, b in pairs)
    np.testing.assert_array_equal(found["partial"](np.ones((2, 3))), 2.0)


SHAPES = st.sampled_from([(), (3,), (2, 0)])
LEAVES = st.one_of(
    st.builds(
        lambda shape, dtype, seed: np.random.default_rng(seed).integers(0, 9, shape).astype(dtype),
        SHAPES,
        st.sampled_from(["float32", "int64", "bool", "complex128"]),
        st.integers(0, 99),
    ),
    st.floats(),
    st.integers(),
    st.text(max_size=5),
    st.none(),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=4), inner, max_size=3),
        st.tuples(inner, inner),
    ),
    max_leaves=8,
)


@hypothesis.given(TREES)
def test_random_trees_come_back(tmp_path_factory, tree):
    path = tmp_path_factory.getbasetemp() / "random"
    nde.save(path, tree)
    for found in (nde.load(path), nde.load(path, like=tree)):
        assert jax.tree.structure(found) == jax.tree.structure(tree)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True)
        assert all(same(a, b) or a != a for a, b in pairs)


def test_functions_of_ones_own_are_filled_into_a_model_that_is_given(tmp_path):
    path = tmp_path / "model"
    model = hybrid({"k": nde.hybrid.Positive(0.3), "c": jnp.ones(2)})
    nde.save(path, model)
    with pytest.raises(CheckpointError, match=r"`model.known` is .*:decay.*like=model"):
        nde.load(path)
    found = nde.load(path, like=hybrid({"k": nde.hybrid.Positive(0.9), "c": jnp.zeros(2)}))
    assert eqx.tree_equal(found, model)


def single(model):
    return jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_array(x) else x, model)


LIKE = [
    (
        mlp(5),
        ["`model.vector_field.mlp.layers[0].weight` is jax float64[4, 2]", "float64[5, 2] here"],
    ),
    (mlp(activation=jnp.tanh), ["activation` is jax.nn:softplus in the file and jax.nn:tanh"]),
    (single(mlp()), ["layers[0].weight` is jax float64[4, 2]", "jax float32[4, 2] here"]),
    ((mlp(), jnp.ones(2)), ["`model` is nde:NeuralODE", "a tuple here"]),
    (
        nde.NeuralODE(mlp().vector_field, solver=diffrax.Heun()),
        ["`model.solver` is diffrax:Tsit5 in the file and diffrax:Heun"],
    ),
]


@pytest.mark.parametrize("like, fragments", LIKE)
def test_another_model_is_refused_with_all_paths(like, fragments, tmp_path):
    nde.save(tmp_path / "model", mlp())
    with pytest.raises(CheckpointError, match=mentions(fragments)):
        nde.load(tmp_path / "model", like=like)


def test_missing_extra_and_differing_leaves_are_listed_together(tmp_path):
    nde.save(tmp_path / "tree", {"a": jnp.ones(2), "b": jnp.ones(3), "c": KEY})
    words = ["`model['b']` is in the file only", "`model['d']` is not in the file",
             "`model['a']` is jax float64[2]", "`model['c']` is key"]  # fmt: skip
    with pytest.raises(CheckpointError, match=mentions(words)):
        nde.load(tmp_path / "tree", like={"a": jnp.ones(4), "c": jnp.ones(2), "d": 1})


def test_what_64_bits_wrote_is_not_rounded_silently(tmp_path):
    nde.save(tmp_path / "tree", {"a": jnp.ones(2)})
    with (
        jax.enable_x64(False),
        pytest.raises(CheckpointError, match="`model..a..` has dtype float64"),
    ):
        nde.load(tmp_path / "tree")


FILE = pack({"model": mlp(), "key": KEY}, {"kind": "model"})


def refused(path, data):
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=str(path)):
        nde.load(path)


def test_no_bit_can_change_unseen(tmp_path):
    header = 8 + int.from_bytes(FILE[:8], "little")
    places = [*RNG.integers(0, header, 100), *RNG.integers(header, len(FILE), 92), *range(8)]
    for place in places:
        data = bytearray(FILE)
        data[place] ^= 1 << RNG.integers(8)
        refused(tmp_path / "model", bytes(data))


def test_truncated_and_longer_files_are_refused(tmp_path):
    for length in [*range(9), *RNG.integers(0, len(FILE), 41), len(FILE) - 1]:
        refused(tmp_path / "model", FILE[:length])
    refused(tmp_path / "model", FILE + b"\0")
    refused(tmp_path / "model", FILE + FILE)


def forged(change):
    """A file whose header was changed by hand, with a digest that is right again."""
    length = int.from_bytes(FILE[:8], "little")
    header = json.loads(FILE[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["nde"])
    change(header, manifest)
    header["__metadata__"] = {"sha256": 64 * "0", "nde": json.dumps(manifest)}
    text = json.dumps({"__metadata__": header.pop("__metadata__")} | header).encode()
    data = len(text).to_bytes(8, "little") + text + FILE[8 + length :]
    return data.replace(64 * b"0", hashlib.sha256(data).hexdigest().encode(), 1)


def first_array(node):
    """The description of some array: the first that is found."""
    if isinstance(node, dict):
        return node if node.get("is") == "array" else first_array(list(node.values()))
    found = map(first_array, node) if isinstance(node, list) else ()
    return next(filter(None, found), None)


FORGERIES = {
    "newer": lambda header, manifest: manifest.update(format=99),
    "huge": lambda header, manifest: first_array(manifest["tree"]).update(shape=[10**6, 10**6]),
    "negative": lambda header, manifest: first_array(manifest["tree"]).update(shape=[-1, -1]),
    "objects": lambda header, manifest: first_array(manifest["tree"]).update(dtype="object"),
    "text": lambda header, manifest: first_array(manifest["tree"]).update(dtype="nothing"),
    "elsewhere": lambda header, manifest: first_array(manifest["tree"]).update(path="../../x"),
    "overlap": lambda header, manifest: list(header.values())[2].update(data_offsets=[0, 8]),
    "beyond": lambda header, manifest: list(header.values())[-1].update(data_offsets=[0, 10**12]),
    "digests": lambda header, manifest: manifest.update(digests={}),
    "kind": lambda header, manifest: manifest.update(kind="training"),
    "no tree": lambda header, manifest: manifest.pop("tree"),
    "no node": lambda header, manifest: manifest.update(tree={"is": "pickle"}),
    "code": lambda header, manifest: manifest.update(
        tree={"is": "object", "name": "os:system", "fields": []}
    ),
    "function": lambda header, manifest: manifest.update(
        tree={"is": "object", "name": "jax.numpy:save", "fields": []}
    ),
    "class": lambda header, manifest: manifest.update(
        tree={"is": "name", "name": "subprocess:Popen"}
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_file_is_refused_and_runs_nothing(name, tmp_path):
    refused(tmp_path / "model", forged(FORGERIES[name]))


@pytest.mark.parametrize("data", [b"\x80\x05cos\nsystem\n.", b"PK\x03\x04" + bytes(60), b"{}" * 40])
def test_other_files_are_refused(data, tmp_path):
    refused(tmp_path / "model", data)


def test_the_forgery_itself_is_a_file_that_loads(tmp_path):
    (tmp_path / "model").write_bytes(forged(lambda header, manifest: None))
    assert eqx.tree_equal(nde.load(tmp_path / "model")["model"], mlp())


def test_names_that_are_there_twice(tmp_path):
    length = int.from_bytes(FILE[:8], "little")
    text = FILE[8 : 8 + length].rstrip()
    twice = text[:-1] + b', "x": {}, "x": {}}'
    refused(tmp_path / "model", len(twice).to_bytes(8, "little") + twice + FILE[8 + length :])


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_what_interrupts_a_save_leaves_the_file_as_it_was(broken, monkeypatch, tmp_path):
    path = tmp_path / "model"
    nde.save(path, mlp())
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        nde.save(path, mlp(5))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError):
        nde.save(tmp_path / "no" / "model", mlp())


def test_traced_arrays_and_objects_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="`model` is traced"):
        jax.jit(lambda x: nde.save(tmp_path / "model", x))(1.0)
    with pytest.raises(ValueError, match="objects"):
        nde.save(tmp_path / "model", np.array([None]))


def test_any_reader_of_the_format_opens_it(tmp_path):
    """Against the layout as its specification has it, read by hand."""
    nde.save(
        tmp_path / "tree", {"a": np.arange(6.0).reshape(2, 3), "b": np.arange(3, dtype=np.int8)}
    )
    data = (tmp_path / "tree").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert all(isinstance(value, str) for value in header["__metadata__"].values())
    entry = header["model['a']"]
    assert (entry["dtype"], entry["shape"]) == ("F64", [2, 3])
    start, stop = entry["data_offsets"]
    found = np.frombuffer(data[8 + length :][start:stop], "<f8").reshape(2, 3)
    np.testing.assert_array_equal(found, np.arange(6.0).reshape(2, 3))
    manifest, _ = unpack(tmp_path / "tree")
    assert manifest["versions"]["jax"] == jax.__version__
