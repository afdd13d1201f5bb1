"""Models in files: the arrays of a PyTree, and what the rest of it is.

The file is in the format of safetensors, which any of its readers opens: the length of a header as
eight bytes, the header as JSON (dtype, shape and place of every array, and a manifest of text), the
arrays one after the other. The manifest holds

    format, versions    of this layout, and of the libraries that wrote it
    tree                the model as plain data: containers, classes, functions and numbers by name
    digests             SHA-256 of every array
    sha256              of the whole file, with zeros in the place of this number

so that no bit can change unseen. Nothing in a file is imported or called: a class or a function is
looked up among those that `nde` and the libraries under it have loaded (`ROOTS`), and a model that
holds others is filled into one that is given.

In code:    a path such as `model.vector_field.scale` -> a key of the header
Cost:       one pass over the file to write or to read it.
Not for:    arrays that are divided over machines: use orbax.
Reference:  https://github.com/huggingface/safetensors
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from nde.solvers.inputs import is_traced

FORMAT = 1
LIBRARIES = ("nde", "jax", "equinox", "diffrax")
ROOTS = (
    *("nde", "nde.solvers", "diffrax", "equinox", "equinox.nn", "jax.nn", "jax.numpy", "jax.lax"),
    *("optimistix", "lineax"),
)
DTYPES = {
    **{"bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16"},
    **{"uint32": "U32", "int32": "I32", "uint64": "U64", "int64": "I64"},
    **{"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"},
    **{"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"},
}  # what safetensors names; others are stored as bytes
SHOWN = 12  # differences in a message
MOST = 100_000_000  # bytes of a header


class CheckpointError(ValueError):
    """A file that is damaged, or does not hold what it is loaded into."""


def save(path: str | os.PathLike, model: PyTree) -> None:
    """Write a model, or any PyTree, to a file. It is there whole, or not at all.

    Args:
        path: The file, such as `"model.safetensors"`; its folder must exist.
        model: PyTree of arrays, random keys, numbers, text and functions.

    Raises:
        ValueError: for a model with traced arrays.
        OSError: if the file cannot be written; what was there before is as it was.
    """
    write(path, pack(model, {"kind": "model"}))


def load(path: str | os.PathLike, like: PyTree = None) -> Any:
    """The model in a file that `save` wrote.

    Args:
        path: The file.
        like: A model of the same structure, whose arrays and numbers are replaced by those of the
            file. Needed where the model holds functions or classes of your own: files name them,
            and nothing that a file names is imported.

    Returns:
        The model, with arrays of the types they had.

    Raises:
        CheckpointError: for a file that is damaged, of another kind or a newer version; where
            `like` has other paths, shapes, types, functions or numbers that are part of the program,
            with all paths that differ; and where a model cannot be rebuilt without `like`.
        OSError: if the file cannot be read.
    """
    manifest, arrays = unpack(path)
    if manifest.get("kind") != "model":
        raise CheckpointError(
            f"{str(path)!r} holds a {manifest.get('kind')!r}, not a model; a checkpoint of a training "
            "run is continued by the call of nde.fit that wrote it."
        )
    return filled(path, manifest, arrays, like)


# What a file holds, as bytes


def pack(tree: PyTree, notes: dict[str, Any]) -> bytes:
    """A PyTree, and notes beside it, as the bytes of a file."""
    writer = Writer()
    described = writer.describe(tree, "model")
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    manifest = {"format": FORMAT, "versions": versions, **notes, "tree": described}
    manifest["digests"] = {name: _digest(raw) for name, (_, _, raw) in writer.arrays.items()}
    header: dict[str, Any] = {
        "__metadata__": {"sha256": 64 * "0", "nde": json.dumps(manifest)},
    }
    place = 0
    for name, (dtype, shape, raw) in writer.arrays.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + len(raw)]}
        place += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(raw for _, _, raw in writer.arrays.values())
    whole = len(text).to_bytes(8, "little") + text + body
    return whole.replace(64 * b"0", _digest(whole).encode(), 1)


def unpack(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The manifest of a file and its arrays, after every check of what a file can have wrong."""
    whole = Path(path).read_bytes()
    broken = lambda what: CheckpointError(
        f"{str(path)!r} {what}; it is damaged, or not a file of nde."
    )
    length = int.from_bytes(whole[:8], "little")
    if len(whole) < 8 or not 2 <= length <= min(MOST, len(whole) - 8):
        raise broken("does not begin with the length of a header")
    try:
        header = json.loads(whole[8 : 8 + length], object_pairs_hook=_unique)
        noted = header.pop("__metadata__")
        sha256, manifest = noted["sha256"], json.loads(noted["nde"], object_pairs_hook=_unique)
        version = manifest["format"]
        assert isinstance(sha256, str) and isinstance(version, int)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
        RecursionError,
    ) as error:
        raise broken("has a header that cannot be read") from error
    found = hashlib.sha256(whole[:8])
    found.update(whole[8 : 8 + length].replace(sha256.encode(), 64 * b"0", 1))
    found.update(memoryview(whole)[8 + length :])
    if found.hexdigest() != sha256:
        raise broken("is not as it was written: its digest differs")
    if version > FORMAT:
        raise CheckpointError(
            f"{str(path)!r} has format {version}, newer than {FORMAT}, the newest that this version of "
            "nde knows; update nde."
        )
    try:
        return manifest, _arrays(header, manifest, memoryview(whole)[8 + length :])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise broken(f"has arrays that do not fit the file ({error})") from error


def write(path: str | os.PathLike, whole: bytes) -> None:
    """Put bytes into a file; a reader finds all of them or what was there before, even if this
    process ends in the middle."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=path.name + ".", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(whole)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    with contextlib.suppress(OSError):  # not every system opens folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def filled(
    path: str | os.PathLike, manifest: dict[str, Any], arrays: dict[str, np.ndarray], like: PyTree
) -> Any:
    """The PyTree of a file, rebuilt from the file alone or into `like`."""
    reader = Reader(arrays)
    try:
        if like is not None:
            expected = Writer().describe(like, "model")
            found = differences(expected, manifest["tree"], "model")
            if found:
                raise CheckpointError(f"{str(path)!r} is not of this model: {listed(found)}")
            return reader.fill(like, manifest["tree"])
        found = reader.build(manifest["tree"], "model")
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(
            f"{str(path)!r} describes its model in a way that nde does not write: {error}"
        ) from error
    if reader.unknown:
        raise CheckpointError(
            f"{str(path)!r} holds what nde cannot make from its name: {listed(reader.unknown)} Make a "
            "model of the same structure and fill it: nde.load(path, like=model)."
        )
    return found


def _arrays(header: dict, manifest: dict, body: memoryview) -> dict[str, np.ndarray]:
    """The arrays as bytes, by name; they fill the body without gaps."""
    digests, end, arrays = manifest["digests"], 0, {}
    if set(digests) != set(header):
        raise ValueError("the names of the digests are others than those of the arrays")
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        if start != end or not start <= stop <= len(body):
            raise ValueError(f"`{name}` lies at {start} to {stop}")
        if _digest(body[start:stop]) != digests[name]:
            raise ValueError(f"`{name}` has another digest")
        arrays[name], end = np.frombuffer(body[start:stop], np.uint8), stop
    if end != len(body):
        raise ValueError(f"{len(body) - end} bytes are left over")
    return arrays


# A PyTree as plain data


class Writer:
    """Describes a PyTree as JSON and collects its arrays."""

    def __init__(self):
        self.arrays: dict[str, tuple[str, list[int], bytes]] = {}

    def describe(self, x: Any, path: str) -> Any:
        """JSON for one node; its arrays are named by path."""
        if x is None or isinstance(x, bool | str):
            return {"is": "value", "value": x}
        if isinstance(x, int | float | complex) and not isinstance(x, np.generic):
            return {"is": "number", "type": type(x).__name__, "value": repr(x)}
        if isinstance(x, np.dtype):
            return {"is": "dtype", "value": x.name}
        if eqx.is_array(x) or isinstance(x, np.ndarray | np.generic):
            return self.array(x, path)
        if isinstance(x, dict):
            items = [
                [self.describe(k, path), self.describe(v, f"{path}[{k!r}]")] for k, v in x.items()
            ]
            return {"is": "dict", "items": items}
        if isinstance(x, list) or type(x) is tuple:
            items = [self.describe(item, f"{path}[{i}]") for i, item in enumerate(x)]
            return {"is": type(x).__name__, "items": items}
        if isinstance(x, functools.partial):
            parts = {"func": x.func, "args": x.args, "keywords": x.keywords}
            fields = [
                [name, self.describe(value, f"{path}.{name}")] for name, value in parts.items()
            ]
            return {"is": "partial", "name": _name(type(x)), "fields": fields}
        if isinstance(x, type) or callable(x) and not dataclasses.is_dataclass(x):
            return {"is": "name", "name": _name(x)}
        fields = _fields(x)
        if fields is None:
            return {"is": "other", "name": _name(type(x)), "text": _text(x)}
        items = [[name, self.describe(value, f"{path}.{name}")] for name, value in fields.items()]
        return {"is": "object", "name": _name(type(x)), "fields": items}

    def array(self, x: Any, path: str) -> Any:
        """Where an array is, and of what type."""
        if is_traced(x):
            raise ValueError(f"`{path}` is traced; save a model outside jit, grad and vmap.")
        where = "jax" if isinstance(x, jax.Array) else "numpy"
        where = "scalar" if isinstance(x, np.generic) else where
        node = {"is": "array", "path": path, "of": where, "shape": list(np.shape(x))}
        if where == "jax" and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            key: Any = x
            node |= {"of": "key", "impl": str(jax.random.key_impl(key))}
            x = jax.random.key_data(key)
        values = np.ascontiguousarray(np.asarray(x))
        if values.dtype == object:
            raise ValueError(f"`{path}` is an array of objects; only numbers are saved.")
        node["dtype"] = values.dtype.name
        if values.dtype.name in DTYPES:
            dtype, shape = DTYPES[values.dtype.name], list(np.shape(x))
        else:
            dtype, shape = "U8", [values.nbytes]
        if path in self.arrays:
            raise ValueError(f"`{path}` names two arrays; give the keys of a dict different names.")
        self.arrays[path] = dtype, shape, values.tobytes()
        return node


class Reader:
    """Makes a PyTree of its description."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays, self.unknown = arrays, []

    def build(self, node: dict[str, Any], path: str) -> Any:
        """What a node describes; what cannot be made is noted in `unknown`."""
        kind = node["is"]
        if kind == "value":
            return node["value"]
        if kind == "number":
            return {"int": int, "float": float, "complex": complex}[node["type"]](node["value"])
        if kind == "dtype":
            return jnp.dtype(node["value"])
        if kind == "array":
            return self.array(node)
        if kind == "dict":
            pairs = [(self.build(k, path), self.build(v, f"{path}[...]")) for k, v in node["items"]]
            return dict(pairs)
        if kind in ("list", "tuple"):
            items = [self.build(item, f"{path}[{i}]") for i, item in enumerate(node["items"])]
            return items if kind == "list" else tuple(items)
        if kind == "partial":
            fields = {name: self.build(value, f"{path}.{name}") for name, value in node["fields"]}
            return fields["func"] and functools.partial(
                fields["func"], *fields["args"], **fields["keywords"]
            )
        found = _known(node["name"]) if kind in ("name", "object") else None
        if found is None or (kind == "object" and not isinstance(found, type)):
            self.unknown.append(f"`{path}` is {node['name']}")
            return None
        if kind == "name":
            return found
        fields = {name: self.build(value, f"{path}.{name}") for name, value in node["fields"]}
        return _made(found, fields)

    def fill(self, like: Any, node: dict[str, Any]) -> Any:
        """`like` with the arrays and numbers of a description of the same structure."""
        kind = node["is"]
        if kind == "array":
            return self.array(node)
        if kind in ("value", "number"):
            return self.build(node, "")
        if kind == "dict":
            values = [v for _, v in node["items"]]
            return type(like)(
                (k, self.fill(x, v)) for (k, x), v in zip(like.items(), values, strict=True)
            )
        if kind in ("list", "tuple"):
            items = (self.fill(x, v) for x, v in zip(like, node["items"], strict=True))
            return list(items) if kind == "list" else tuple(items)
        if kind == "partial":
            fields = {n: self.fill(getattr(like, n), v) for n, v in node["fields"]}
            return type(like)(fields["func"], *fields["args"], **fields["keywords"])
        if kind != "object":
            return like
        return _made(type(like), {n: self.fill(getattr(like, n), v) for n, v in node["fields"]})

    def array(self, node: dict[str, Any]) -> Any:
        """An array of its type; a random key is one again."""
        raw = self.arrays[node["path"]].view(jnp.dtype(node["dtype"]))
        if node["of"] == "key":
            data = raw.reshape(*node["shape"], -1) if raw.size else raw.reshape(*node["shape"], 2)
            return jax.random.wrap_key_data(jnp.asarray(data), impl=node["impl"])
        array = raw.reshape(node["shape"])
        if node["of"] == "scalar":
            return array[()]
        if node["of"] == "numpy":
            return array.copy()
        kept = jax.dtypes.canonicalize_dtype(array.dtype)
        if kept != array.dtype:
            raise CheckpointError(
                f"`{node['path']}` has dtype {array.dtype}, which jax would make {kept}; allow 64 bits: "
                'jax.config.update("jax_enable_x64", True).'
            )
        return jnp.asarray(array)


def _made(kind: type, fields: dict[str, Any]) -> Any:
    """An object with these fields, as unflattening a PyTree makes it: without `__init__`."""
    if issubclass(kind, tuple):
        return tuple.__new__(kind, fields.values())
    made = object.__new__(kind)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


def _fields(x: Any) -> dict[str, Any] | None:
    """The fields of a record, by name."""
    names = getattr(x, "_fields", None)
    if isinstance(x, tuple) and names is not None:
        return dict(zip(names, x, strict=True))
    if dataclasses.is_dataclass(x):
        return {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if hasattr(x, f.name)}
    return None


def _name(x: Any) -> str:
    """Module and name; of two, that which a library makes public, and keeps."""
    name = getattr(x, "__qualname__", None) or getattr(x, "__name__", "?")
    for root in ROOTS:
        if getattr(sys.modules.get(root), name, None) is x:
            return f"{root}:{name}"
    return f"{getattr(x, '__module__', '?')}:{name}"


def _text(x: Any) -> str:
    text = repr(x)
    return "" if " at 0x" in text else text


def _known(name: str) -> Any:
    """The function or record class of that name, if a library that is in use has it."""
    module, _, qualname = name.partition(":")
    found: Any = sys.modules.get(module)
    if not any(module == root or module.startswith(root + ".") for root in ROOTS):
        return None
    for part in qualname.split("."):
        found = getattr(found, part, None)
    is_record = isinstance(found, type) and _is_record(found)
    if not is_record and (isinstance(found, type) or not callable(found)):
        return None
    return found if _name(found) == name else None


def _is_record(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) or issubclass(kind, tuple) and hasattr(kind, "_fields")


def differences(expected: Any, found: Any, path: str) -> list[str]:
    """In words, where two descriptions differ; values of arrays and numbers may."""
    if expected["is"] != found["is"]:
        return [f"`{path}` is {_short(found)} in the file and {_short(expected)} here"]
    kind = expected["is"]
    if kind == "number":
        same = expected["type"] == found["type"]
    elif kind == "array":
        same = all(expected.get(n) == found.get(n) for n in ("shape", "dtype", "of", "impl"))
    elif kind in ("dict", "list", "tuple", "object", "partial"):
        return _inner_differences(expected, found, path)
    else:
        same = expected == found
    return [] if same else [f"`{path}` is {_short(found)} in the file and {_short(expected)} here"]


def _inner_differences(expected: Any, found: Any, path: str) -> list[str]:
    if expected.get("name") != found.get("name"):
        return [f"`{path}` is {_short(found)} in the file and {_short(expected)} here"]
    ours, theirs = members(expected, path), members(found, path)
    missing = [f"`{name}` is not in the file" for name in ours if name not in theirs]
    extra = [f"`{name}` is in the file only" for name in theirs if name not in ours]
    both = [differences(ours[name], theirs[name], name) for name in ours if name in theirs]
    return missing + extra + [line for lines in both for line in lines]


def members(node: Any, path: str) -> dict[str, Any]:
    if node["is"] in ("object", "partial"):
        return {f"{path}.{name}": value for name, value in node["fields"]}
    if node["is"] == "dict":
        return {f"{path}[{key.get('value')!r}]": value for key, value in node["items"]}
    return {f"{path}[{i}]": value for i, value in enumerate(node["items"])}


def _short(node: Any) -> str:
    if node["is"] == "array":
        return f"{node['of']} {node['dtype']}{node['shape']}"
    if "name" in node:
        return node["name"] + (f" {node['text']}" if node.get("text") else "")
    return repr(node["value"]) if "value" in node else f"a {node['is']}"


def listed(lines: list[str]) -> str:
    more = f"; and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return "; ".join(lines[:SHOWN]) + more + "."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without a name that is there twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _digest(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()
