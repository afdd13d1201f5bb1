"""What a function computes, as a value that can be compared: for a cache that notices what changed.

Two functions are the same if they have the same code and see the same values: closures, defaults, and
the globals that the code names, followed through the user's own functions, classes and modules. What a
library defines at the top of a module is itself. Arrays count by content. Whatever is not understood
raises `Unknown`, and then nothing is reused: a cache may forget, and never be wrong.
"""

import dataclasses
import enum
import functools
import hashlib
import sys
import types
from typing import Any

import jax
import jax.core
import numpy as np

PLAIN = (type(None), bool, int, float, complex, str, bytes, np.generic, np.dtype, enum.Enum)
PARTS = (types.FunctionType, types.MethodType, functools.partial, dict, list, tuple, set, frozenset)


class Unknown(Exception):
    """Something whose value cannot be compared."""


class Same:
    """An object that is equal to itself alone, and kept alive while it is compared with."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def fingerprint(value: Any) -> Any:
    """A hashable value that is equal for functions and objects that do the same.

    Raises:
        Unknown: for what cannot be compared.
    """
    return _of(value, {})


def _of(value: Any, seen: dict[int, Any]) -> Any:
    if isinstance(value, PLAIN):
        return type(value), repr(value) if isinstance(value, float | complex) else value
    if id(value) in seen:
        return "again", list(seen).index(id(value))
    if isinstance(value, jax.core.Tracer):
        raise Unknown("a traced value")
    if isinstance(value, np.ndarray | jax.Array):
        return _array(value)
    if isinstance(value, types.ModuleType):
        return Same(value)
    if _is_of_library(value):
        return Same(value)
    seen[id(value)] = value
    if isinstance(value, type):
        return _class(value, seen)
    if isinstance(value, PARTS):
        return _parts(value, seen)
    return _object(value, seen)


def _array(value: Any) -> Any:
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return str(jax.random.key_impl(value)), _array(jax.random.key_data(value))
    array = np.asarray(value)
    if array.dtype == object:
        raise Unknown("an array of objects")
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    weak = bool(getattr(value, "weak_type", False))
    return type(value).__name__, array.shape, str(array.dtype), weak, digest


def _parts(value: Any, seen: dict[int, Any]) -> Any:
    if isinstance(value, types.FunctionType):
        return _function(value, seen)
    if isinstance(value, types.MethodType):
        return "method", _of(value.__func__, seen), _of(value.__self__, seen)
    if isinstance(value, functools.partial):
        return "partial", *(_of(x, seen) for x in (value.func, value.args, value.keywords))
    if isinstance(value, dict):
        return type(value), *((_of(k, seen), _of(v, seen)) for k, v in value.items())
    if isinstance(value, set | frozenset):
        return type(value), frozenset(_of(item, seen) for item in value)
    return type(value), *(_of(item, seen) for item in value)


def _function(value: types.FunctionType, seen: dict[int, Any]) -> Any:
    try:
        held = [cell.cell_contents for cell in value.__closure__ or ()]
    except ValueError as error:  # a cell without contents yet
        raise Unknown(repr(value)) from error
    found = [value.__code__, _of(value.__defaults__, seen), _of(value.__kwdefaults__, seen)]
    found += [_of(item, seen) for item in held]
    if not _is_library(value.__module__):
        found += _globals(value, seen)
    return tuple(found)


def _globals(value: types.FunctionType, seen: dict[int, Any]) -> list[Any]:
    """The globals that the code names; of the user's modules, the attributes that it names."""
    names, codes = set(), [value.__code__]
    while codes:
        code = codes.pop()
        names |= set(code.co_names)
        codes += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    found = []
    for name in sorted(names & set(value.__globals__)):
        item = value.__globals__[name]
        found.append((name, _of(item, seen)))
        if isinstance(item, types.ModuleType) and not _is_library(item.__name__):
            found += [
                (name, n, _of(getattr(item, n), seen)) for n in sorted(names & set(vars(item)))
            ]
    return found


def _class(value: type, seen: dict[int, Any]) -> Any:
    """A class is itself, as long as its methods see the same values."""
    found: list[Any] = [Same(value)]
    for base in value.__mro__:
        if _is_library(base.__module__):
            continue
        for name, item in sorted(vars(base).items()):
            item = getattr(item, "__wrapped__", getattr(item, "fget", item))
            item = getattr(item, "__func__", item)
            if isinstance(item, types.FunctionType) and not _is_library(item.__module__):
                found.append((name, _of(item, seen)))
    return tuple(found)


def _object(value: Any, seen: dict[int, Any]) -> Any:
    kind = _of(type(value), seen)
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]
        return kind, *((name, _of(getattr(value, name), seen)) for name in names)
    if hasattr(value, "__wrapped__"):  # jax.jit(function)
        return kind, _of(value.__wrapped__, seen)
    if hasattr(value, "__dict__") and not _is_library(type(value).__module__):
        return kind, _of(dict(vars(value)), seen)
    raise Unknown(repr(value))


def _is_of_library(value: Any) -> bool:
    """Whether a library defines it, at the top of a module, once and for all."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(name, str):
        name = getattr(value, "__name__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        return isinstance(value, types.BuiltinFunctionType | np.ufunc)
    if not _is_library(module):
        return False
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found is value


@functools.cache
def _is_library(module: str) -> bool:
    """Whether a module is installed, and not what the user is working on."""
    root = module.split(".")[0]
    if root in ("nde", "builtins") or root in sys.stdlib_module_names:
        return root != "__main__"
    path = getattr(sys.modules.get(root), "__file__", None) or ""
    return "site-packages" in path or "dist-packages" in path
