"""Pictures of a run and of a model. Each function takes an axis, or makes one, and returns it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, PyTree

from nde._training.history import History

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("`nde.plot` needs matplotlib: python -m pip install matplotlib.") from error

__all__ = ["loss", "phase", "save", "trajectories"]


def loss(history: History, ax: Axes | None = None, **style: Any) -> Axes:
    """The loss by step, on a logarithmic axis if it is positive, with its running median, and the
    validation; skipped steps are marked. `loss(history).figure.savefig("loss.png")` is a file of it.

    Args:
        history: What `nde.fit` returned, of at least one step.
        ax: Where to draw.
        style: Passed to `Axes.plot` for the median, such as `color` or `label`.
    """
    if len(history) == 0:
        raise ValueError(
            "`history` has no steps to draw; train for one or more: nde.fit(..., steps=100)."
        )
    ax = _axis(ax)
    rows = np.where(history["skipped"], np.nan, history["loss"])
    steps = np.arange(rows.size)
    width = max(1, rows.size // 50)
    blocks = [slice(start, start + width) for start in range(0, rows.size, width)]
    blocks = [block for block in blocks if np.isfinite(rows[block]).any()]
    center = [steps[block].mean() for block in blocks]
    (line,) = ax.plot(center, [np.nanmedian(rows[block]) for block in blocks], **style)
    ax.plot(steps, rows, color=line.get_color(), alpha=0.3, linewidth=0.8)
    skipped = steps[history["skipped"]]
    if skipped.size:
        bottom = np.full(skipped.size, 0.02)
        ax.plot(
            skipped,
            bottom,
            "x",
            color="tab:red",
            transform=ax.get_xaxis_transform(),
            label="skipped",
        )
    ax.set(xlabel="step", ylabel="loss")
    values = history.columns.get("validation", np.full(rows.size, np.nan))
    seen = np.isfinite(values)
    if seen.any():
        ax.plot(steps[seen], values[seen], ".-", color="tab:orange", label="validation")
    if not np.any(rows <= 0):
        ax.set(yscale="log")
    return ax


def trajectories(
    ts: Float[ArrayLike, " times"],
    ys: Float[ArrayLike, "times channels"],
    observed: tuple[ArrayLike, ArrayLike] | None = None,
    ax: Axes | None = None,
    *,
    labels: Sequence[str] | None = None,
    **style: Any,
) -> Axes:
    """States over time as lines, one color per channel, and observations as dots of the same color.

    Args:
        ts: Times, shape (times,).
        ys: States of one trajectory, shape (times, channels) or (times,).
        observed: Times and values of the observations, shapes (n,) and (n, channels) or (n,); NaN
            is left out.
        ax: Where to draw.
        labels: Name of each channel, for the legend.
        style: Passed to `Axes.plot` for the lines.

    Raises:
        ValueError: for shapes that do not fit, such as those of a batch.
    """
    ts, ys = _series("ys", ts, ys)
    channels = ys.shape[1]
    if observed is not None and not (isinstance(observed, tuple | list) and len(observed) == 2):
        raise ValueError("`observed` is the pair of times and values: observed=(ts, ys).")
    seen = None if observed is None else _series("observed", *observed)
    if seen is not None and seen[1].shape[1] != channels:
        raise ValueError(f"`observed` has {seen[1].shape[1]} channels but `ys` has {channels}.")
    if labels is not None and len(labels) != channels:
        raise ValueError(f"`labels` has {len(labels)} names but `ys` has {channels} channels.")
    ax = _axis(ax)
    for channel in range(channels):
        if labels is not None:
            style["label"] = labels[channel]
        (line,) = ax.plot(ts, ys[:, channel], **style)
        if seen is not None:
            times, values = seen[0], seen[1][:, channel]
            ax.plot(
                times, values, "o", color=line.get_color(), markersize=4, markeredgecolor="white"
            )
    ax.set(xlabel="t")
    return ax


def _series(name: str, ts: ArrayLike, ys: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Times of shape (times,) and values of shape (times, channels)."""
    ts, ys = np.asarray(ts), np.asarray(ys)
    if ts.ndim != 1 or ys.ndim not in (1, 2) or ys.shape[0] != ts.shape[0]:
        raise ValueError(
            f"`{name}` has times of shape {ts.shape} and values of shape {ys.shape}; one trajectory is "
            "(times,) and (times, channels) or (times,). Draw a batch one by one, on the same axis."
        )
    return ts, ys if ys.ndim == 2 else ys[:, None]


def fan(
    ts: Float[ArrayLike, " times"],
    paths: Float[ArrayLike, "draws times channels"],
    observed: tuple[ArrayLike, ArrayLike] | None = None,
    ax: Axes | None = None,
    *,
    levels: Sequence[float] = (0.5, 0.9),
    channel: int = 0,
    **style: Any,
) -> Axes:
    """Bands that hold the central part of the draws of a model at each time, their median, and data.

    Args:
        ts: Times, shape (times,).
        paths: Draws, shape (draws, times, channels) or (draws, times).
        observed: Times and values of data: shapes (n,) and (n, channels) or (n,) of one series, drawn as
            dots, or (examples, n, channels) of several, drawn as thin lines.
        ax: Where to draw.
        levels: Parts of the draws in the bands.
        channel: Which channel is drawn.
        style: Passed to `Axes.plot` for the median, such as `color` or `label`.

    Raises:
        ValueError: for shapes that do not fit, such as those of one path.
    """
    ts, paths = _sample_paths("paths", ts, paths, channel)
    ax = _axis(ax)
    (line,) = ax.plot(ts, np.median(paths, axis=0), **style)
    for level in sorted(levels, reverse=True):
        low, high = np.quantile(paths, [(1 - level) / 2, (1 + level) / 2], axis=0)
        ax.fill_between(ts, low, high, color=line.get_color(), alpha=0.25, linewidth=0, zorder=0.5)
    if observed is not None and np.ndim(observed[1]) == 3:
        times, series = _sample_paths("observed", *observed, channel)
        ax.plot(times, series.T, color="0.3", linewidth=0.6, alpha=0.6)
    elif observed is not None:
        times, values = _series("observed", *observed)
        ax.plot(times, values[:, channel], "o", color="0.2", markersize=3)
    ax.set(xlabel="t")
    return ax


def marginals(
    ts: Float[ArrayLike, " times"],
    paths: Float[ArrayLike, "draws times channels"],
    observed: Float[ArrayLike, "examples times channels"],
    ax: Axes | None = None,
    *,
    at: Sequence[int] | int = 5,
    channel: int = 0,
    bins: int = 30,
) -> Axes:
    """Histograms of data (to the left of each time) and of a model (to the right), back to back.

    Args:
        ts: Times, shape (times,), increasing.
        paths: Draws of the model, shape (draws, times, channels) or (draws, times).
        observed: Data at the same times, shape (examples, times, channels) or (examples, times).
        ax: Where to draw.
        at: Indices of the times, or how many of them, spread over the series.
        channel: Which channel is drawn.
        bins: Of each histogram, over the range of both samples at that time.

    Raises:
        ValueError: for shapes that do not fit.
    """
    times, paths = _sample_paths("paths", ts, paths, channel)
    _, observed = _sample_paths("observed", ts, observed, channel)
    rows = np.asarray(at)
    if rows.ndim == 0:
        rows = np.unique(np.linspace(0, times.size - 1, int(rows) + 1).round().astype(int))[1:]
    ax = _axis(ax)
    where = times[rows]
    width = 0.45 * (np.diff(where).min() if where.size > 1 else 1.0)
    for i, t in zip(rows, where, strict=True):
        both = np.concatenate([paths[:, i], observed[:, i]])
        edges = np.histogram_bin_edges(both, bins)
        counts = [np.histogram(side[:, i], edges, density=True)[0] for side in (observed, paths)]
        scale = width / max(count.max() for count in counts)
        for count, side, color in zip(counts, (-scale, scale), ("0.55", "C0"), strict=True):
            label = ("data" if side < 0 else "model") if t == where[0] else None
            ax.stairs(
                t + side * count,
                edges,
                baseline=t,
                orientation="horizontal",
                fill=True,
                color=color,
                label=label,
            )
    ax.set(xlabel="t")
    return ax


def _sample_paths(
    name: str, ts: ArrayLike, paths: ArrayLike, channel: int
) -> tuple[np.ndarray, np.ndarray]:
    """Times, and one channel of several paths, shape (paths, times)."""
    ts, paths = np.asarray(ts), np.asarray(paths)
    if ts.ndim != 1 or paths.ndim not in (2, 3) or paths.shape[1] != ts.shape[0]:
        raise ValueError(
            f"`{name}` has times of shape {ts.shape} and values of shape {paths.shape}; several paths at "
            "the same times are (times,) and (paths, times, channels) or (paths, times)."
        )
    paths = paths if paths.ndim == 3 else paths[..., None]
    if not 0 <= channel < paths.shape[2]:
        raise ValueError(f"`channel` is {channel} but `{name}` has {paths.shape[2]} channels.")
    return ts, paths[..., channel]


def phase(
    vector_field: Callable,
    xlim: tuple[float, float],
    ylim: tuple[float, float],
    ys: Float[ArrayLike, "... times 2"] | None = None,
    ax: Axes | None = None,
    *,
    t: float = 0.0,
    args: PyTree[Any] = None,
    grid: int = 32,
    **style: Any,
) -> Axes:
    """The streamlines of a planar vector field, with trajectories on them; a dot marks where each
    starts.

    Args:
        vector_field: `vector_field(t, y, args) -> dy` on states of shape (2,), such as
            `model.vector_field`.
        xlim: Range of the first channel.
        ylim: Range of the second channel.
        ys: Trajectories to draw, shape (..., times, 2).
        ax: Where to draw.
        t: Time at which the field is shown.
        args: Passed to the field.
        grid: Points of the grid in each direction.
        style: Passed to `Axes.plot` for the trajectories.

    Raises:
        ValueError: for a field or trajectories that are not planar, and for an empty range.
    """
    if min(xlim) == max(xlim) or min(ylim) == max(ylim):
        raise ValueError(
            f"`xlim` is {xlim} and `ylim` is {ylim}; each is a range, such as (-1, 1)."
        )
    x, y = (np.linspace(min(lim), max(lim), grid) for lim in (xlim, ylim))
    points = jnp.asarray(np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2), dtype=float)
    try:
        rates = jax.vmap(lambda y: vector_field(jnp.asarray(t, dtype=float), y, args))(points)
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(
            "`vector_field` cannot be applied to a state of shape (2,). A phase portrait is of a "
            f"planar field (of a model: model.vector_field). {error}"
        ) from error
    if not eqx.is_array(rates) or rates.shape != points.shape:
        raise ValueError(
            "`vector_field` returned one example of "
            f"{eqx.tree_pformat(jax.tree.map(lambda rate: rate[0], rates))}; a phase portrait needs "
            "an array of shape (2,)."
        )
    if ys is not None and (np.ndim(ys) < 2 or np.shape(ys)[-1] != 2):
        raise ValueError(
            f"`ys` has shape {np.shape(ys)}; trajectories in the plane are (..., times, 2): choose "
            "two channels, ys[..., :2]."
        )
    ax = _axis(ax)
    dx, dy = np.moveaxis(np.asarray(rates).reshape(grid, grid, 2), -1, 0)
    ax.streamplot(x, y, dx, dy, color="0.8", linewidth=0.6, arrowsize=0.6, density=1.1, zorder=0)
    if ys is not None:
        for trajectory in np.asarray(ys).reshape(-1, *np.shape(ys)[-2:]):
            (line,) = ax.plot(trajectory[:, 0], trajectory[:, 1], **style)
            ax.plot(*trajectory[0], "o", color=line.get_color(), markersize=5)
    ax.set(xlim=xlim, ylim=ylim)
    return ax


def save(figure: Figure, path: str | Path) -> Path:
    """Write a picture, close it, and print where it is: the absolute path, which is returned.

    Args:
        figure: What was drawn.
        path: From the working directory; the ending says the format.
    """
    path = Path(path).resolve()
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"picture: {path}")
    return path


def _axis(ax: Axes | None) -> Axes:
    return plt.subplots()[1] if ax is None else ax
