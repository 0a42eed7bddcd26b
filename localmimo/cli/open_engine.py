"""Opens the engine that a command line asks for: the flags that chat, serve and bench share.

Knows flags and sentences; imports torch only when a pack is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from localmimo.cli.packs import EMBEDDED, pack_folder
from localmimo.cli.ui import Ui, bar, parse_count
from localmimo.hardware.device import check_device
from localmimo.hardware.host import parse_bytes

if TYPE_CHECKING:
    from localmimo.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFlags:
    """How a pack is to be opened, as it was typed; the meanings are those of `localmimo.load`."""

    context: str | None = None
    ram: str | None = None
    vram: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    kv: str = "auto"
    profile: str | None = "default"  # "none" and None: no statistics are kept
    prefetch: bool = True
    trust: bool = False
    draft: str = "auto"

    def check(self) -> None:
        """What can be refused before the slow imports. Raises BadRequest."""
        if self.context is not None:
            parse_count(self.context, "--context")
        for size in (self.ram, self.vram):
            if size is not None:
                parse_bytes(size)
        check_device(self.device)


def open_engine(
    model: str | None, flags: LoadFlags, ui: Ui, hear: Callable[[int, int], object] = lambda done, total: None
) -> Engine:
    """Load a pack, None for the embedded model, saying so while it lasts; `hear` as for `localmimo.load`."""
    context = None if flags.context is None else parse_count(flags.context, "--context")
    folder = None if model is None else pack_folder(model)
    ui.status.show(f"  opening {model or EMBEDDED} ...", now=True)
    try:
        from localmimo.engine import load
        from localmimo.loading.embedded import embedded_pack

        if folder is None:
            ui.status.clear()  # the first use says what it does
        folder = folder or embedded_pack()
        name = folder.name
        ui.status.show(f"  opening {name} ...", now=True)

        def heard(done: int, total: int) -> None:
            ui.status.show(f"  opening {name} {bar(done / total)} {done / total:4.0%}")
            hear(done, total)

        return load(
            folder, context=context, ram=flags.ram, vram=flags.vram, device=flags.device,
            dtype=flags.dtype, kv=flags.kv,  # type: ignore[arg-type]
            profile=None if flags.profile == "none" else flags.profile,
            prefetch=flags.prefetch, trust=flags.trust, draft=flags.draft,  # type: ignore[arg-type]
            on_progress=heard,
        )  # fmt: skip
    finally:
        ui.status.clear()
