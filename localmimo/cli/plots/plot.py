"""Pictures: lines over slots, a map of experts; drawn with matplotlib, if it is installed.

Knows numbers and names; no command, no model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localmimo.cli.ui import Ui
from localmimo.errors import BadRequest
from quant.files.atomic import written_aside

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = (".svg", ".png")


def check_plot(path: Path | None) -> None:
    """Raise BadRequest before any work is done for a picture that cannot be written."""
    if path is None:
        return
    if path.suffix.lower() not in SUFFIXES:
        raise BadRequest(f'--plot is "{path}"; its name must end in {" or ".join(SUFFIXES)}.')
    if not path.absolute().parent.is_dir():
        raise BadRequest(f"--plot: there is no folder {path.absolute().parent}.")


def picture(path: Path, draw: Callable[[], None], ui: Ui) -> bool:
    """Draw, and say where; without matplotlib say that the text has the figures. Whether it was drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        ui.note(f" matplotlib is not installed (pip install 'localmimo[plot]'), so {path} is not written:")
        return False
    draw()
    ui.note(f" The picture is in {path}.")
    return True


def draw_lines(
    path: Path, x: Sequence[float], lines: Mapping[str, Sequence[float]], names: tuple[str, str]
) -> None:
    """Curves over x, one per name; names: of the two axes."""
    figure, (axes,) = _figure(7, 4.5, 1)
    for (name, values), style in zip(lines.items(), ("-o", "--s", ":^", "-."), strict=False):
        axes.plot(x, values, style, label=name, markersize=4)
    axes.set(xlabel=names[0], ylabel=names[1])
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def draw_map(
    path: Path,
    values: NDArray[Any],
    rows: Sequence[int],
    names: tuple[str, str, str],
    tiers: Mapping[int, str] | None = None,
) -> None:
    """A map of values [rows, columns]; names: of columns, rows and values.

    tiers: row -> a letter per column (experts/placement.py), drawn below it.
    """
    height = 1.5 + 0.12 * len(rows)
    figure, panels = _figure(9, height * (2 if tiers else 1), 2 if tiers else 1)
    image = panels[0].imshow(values, aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(image, ax=panels[0], label=names[2])
    if tiers:
        _draw_tiers(figure, panels[1], [tiers[row] for row in rows])
    shown = range(0, len(rows), max(1, len(rows) // 12))
    for axes in panels:
        axes.set(xlabel=names[0], ylabel=names[1])
        axes.set_yticks(list(shown), [str(rows[row]) for row in shown])
    save(figure, path)


def save(figure: Any, path: Path, **options: Any) -> None:
    """Write a picture in the format of its name: whole, or not at all."""
    with written_aside(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), **options)


def _draw_tiers(figure: Any, axes: Any, letters: Sequence[str]) -> None:
    """The tier that each page is in now."""
    from matplotlib.colors import ListedColormap

    values = [["rg".find(letter) + 1 for letter in row] for row in letters]
    colours = ListedColormap(["#eeeeee", "#4f7fbf", "#2f6f4f"])
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=colours, vmin=-0.5, vmax=2.5)
    bar = figure.colorbar(image, ax=axes, ticks=[0, 1, 2], label="is now in")
    bar.ax.set_yticklabels(["disk", "ram", "gpu"])


def _figure(width: float, height: float, n_panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    return figure, list(figure.subplots(n_panels, 1, squeeze=False)[:, 0])
