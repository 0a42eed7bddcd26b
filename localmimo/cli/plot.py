"""Pictures for people who would rather look: lines over slots, a map of experts. Draws with matplotlib, where it is.

Knows numbers and names; no command, no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localmimo.errors import BadRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = (".svg", ".png")


def check_plot(path: Path | None) -> None:
    """Raise BadRequest before any work is done for a picture that can not be drawn."""
    if path is None:
        return
    if path.suffix.lower() not in SUFFIXES:
        raise BadRequest(f"--plot is {path}; give a name that ends with .svg or .png.")
    if not path.absolute().parent.is_dir():
        raise BadRequest(f"--plot is {path}, but there is no folder {path.absolute().parent}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BadRequest("--plot needs matplotlib: pip install 'localmimo[plot]'.") from None


def draw_lines(
    path: Path, x: Sequence[float], lines: Mapping[str, Sequence[float]], names: tuple[str, str]
) -> None:
    """Curves over x, one per name; names: of the two axes."""
    figure, axes = _figure(7, 4.5)
    for (name, values), style in zip(lines.items(), ("-o", "--s", ":^", "-."), strict=False):
        axes.plot(x, values, style, label=name, markersize=4)
    axes.set(xlabel=names[0], ylabel=names[1])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def draw_map(path: Path, values: NDArray[Any], rows: Sequence[int], names: tuple[str, str, str]) -> None:
    """A map of values [rows, columns]; names: of columns, rows and values."""
    figure, axes = _figure(9, 1.5 + 0.12 * len(rows))
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap="viridis")
    axes.set(xlabel=names[0], ylabel=names[1])
    shown = range(0, len(rows), max(1, len(rows) // 12))
    axes.set_yticks(list(shown), [str(rows[row]) for row in shown])
    figure.colorbar(image, label=names[2])
    figure.savefig(path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    return figure, figure.subplots()
