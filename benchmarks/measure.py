"""Measuring beside the peers: what every benchmark of this folder shares.

A number from a busy machine means little, a ratio of two numbers taken in turns means a lot. So
methods are timed in rounds: each round runs every method once, starting from another one each time,
and a ratio is the median over rounds of the ratio within a round. Compilation is timed in a process
of its own, where no other method has filled a cache before.
"""

import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

Seconds = list[float]


def in_fresh_process(work: Callable[..., Any], *args: Any) -> Any:
    """`work(*args)` in a new Python process. `work` is a module-level function; all must pickle."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(work, *args).result()


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Seconds]:
    """Seconds of each call, round by round; one round of every call beforehand is thrown away."""
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, Seconds] = {name: [] for name in calls}
    names = list(calls)
    for round_ in range(rounds):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def compile_seconds(build: Callable[[], Any], repeats: int) -> Seconds:
    """Seconds of `build()`, which traces, lowers and compiles, each time with empty caches.

    One small compilation beforehand starts the compiler's threads, which no method should pay for.
    """
    jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda i, y: y @ y, x)).lower(jnp.eye(2)).compile()
    seconds = []
    for _ in range(repeats):
        jax.clear_caches()
        start = time.perf_counter()
        build()
        seconds.append(time.perf_counter() - start)
    return seconds


def temporary_megabytes(compiled: Any) -> float:
    """What a compiled call needs besides its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def relative_difference(tree: Any, reference: Any) -> float:
    """Largest over leaves of max|a - b| / max|b|."""
    differences = jax.tree.map(
        lambda a, b: float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))), tree, reference
    )
    return max(jax.tree.leaves(differences))


def ratio(seconds: Mapping[str, Seconds], name: str, peer: str) -> float:
    """How many times longer `name` takes than `peer`: the median of the ratios within rounds."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[peer], strict=True))


class Claim(NamedTuple):
    """A measured ratio beside what it must not exceed (None: only measured)."""

    what: str
    value: float
    at_most: float | None

    @property
    def holds(self) -> bool:
        """Whether the value is within its target."""
        return self.at_most is None or self.value <= self.at_most

    def line(self) -> str:
        """One line for the terminal."""
        if self.at_most is None:
            return f"        {self.what:52s} {self.value:7.3f}"
        verdict = "pass" if self.holds else "FAIL"
        return f"  {verdict}  {self.what:52s} {self.value:7.3f}  (at most {self.at_most:g})"

    def record(self) -> dict[str, Any]:
        """The claim as it stands in a results file."""
        return {"what": self.what, "value": significant(self.value), "at_most": self.at_most}


def significant(value: Any, digits: int = 4) -> Any:
    """Numbers of a nested record, rounded to what a measurement is worth."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: significant(entry, digits) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [significant(entry, digits) for entry in value]
    return value


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A text table; missing entries (None) are shown as a dash."""
    cells = [list(header), *([_cell(entry) for entry in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
    ]
    return "\n".join(lines)


def _cell(entry: Any) -> str:
    if entry is None:
        return "-"
    return f"{entry:.3g}" if isinstance(entry, float) else str(entry)


def compiled_calls(
    methods: dict[str, tuple[Any, Callable]], inputs: Any
) -> tuple[dict[str, Callable], dict[str, float]]:
    """Gradients by name, compiled, and the megabytes that each needs."""
    calls, memory = {}, {}
    for name, (model, loss) in methods.items():
        params, static = eqx.partition(model, eqx.is_inexact_array)
        closed = lambda params, inputs, loss=loss, static=static: loss(
            eqx.combine(params, static), inputs
        )
        compiled = jax.jit(jax.grad(closed)).lower(params, inputs).compile()
        memory[name] = temporary_megabytes(compiled)
        calls[name] = lambda compiled=compiled, params=params: compiled(params, inputs)
    return calls, memory


def entry(what: str, case: dict, seconds: dict, memory: dict, claims: list) -> dict[str, Any]:
    """One problem of a report: medians by method, memory, and the claims about them."""
    return {
        "what": what,
        "case": case,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "temporary_megabytes": memory,
        "claims": claims,
    }


def show_and_write(
    entries: Sequence[dict[str, Any]], out: Path | None, packages: Sequence[str]
) -> None:
    """Prints entries, and saves them if `out` is given."""
    for result in entries:
        rows = [
            [name, 1e3 * seconds, result["temporary_megabytes"].get(name)]
            for name, seconds in result["seconds"].items()
        ]
        print(f"\n{result['what']} {result['case']}")
        print(table(("method", "ms", "MB"), rows))
        for claim in result["claims"]:
            print(claim.line())
    if out is not None:
        records = [
            result | {"claims": [claim.record() for claim in result["claims"]]}
            for result in entries
        ]
        write(out, {"environment": environment(packages), "cases": records})


def environment(packages: Sequence[str]) -> dict[str, Any]:
    """The machine and the versions that a number belongs to."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages if _version(name)},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Saves a report with the date and the command that made it."""
    words = ["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]
    stamp = {"date": datetime.date.today().isoformat(), "command": shlex.join(words)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(significant({**stamp, **report}), indent=1) + "\n")
