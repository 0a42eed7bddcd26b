"""Opens the engine that a command line asks for, and shows the progress.

Knows load options and sentences; imports torch only when a pack is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from localmimo.cli.packs import EMBEDDED, pack_folder
from localmimo.cli.ui import Ui, bar
from localmimo.loading.options import LOAD_OPTIONS, LoadOptions

if TYPE_CHECKING:
    from localmimo.engine import Engine


def open_engine(
    model: str | None,
    options: LoadOptions,
    ui: Ui,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> Engine:
    """Load a pack, None for the embedded model, showing the progress; `on_progress` as for `localmimo.load`."""
    folder = None if model is None else pack_folder(model)
    ui.status.show(f"  opening {model or EMBEDDED} ...", now=True)
    try:
        from localmimo.engine import load
        from localmimo.loading.embedded import embedded_pack

        if folder is None:
            ui.status.clear()  # a first use prints its own lines
        folder = folder or embedded_pack()
        name = folder.name
        ui.status.show(f"  opening {name} ...", now=True)

        def on_bytes(done: int, total: int) -> None:
            ui.status.show(f"  opening {name} {bar(done / total)} {done / total:4.0%}")
            on_progress(done, total)

        keywords: dict[str, Any] = {name: getattr(options, name) for name in LOAD_OPTIONS}
        return load(folder, **keywords, on_progress=on_bytes)
    finally:
        ui.status.clear()
