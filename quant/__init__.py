"""The quantizer: makes packs of MiMo-V2 checkpoints, and holds the codecs and kernels of packed weights.

It must not know how a model runs, nor import `localmimo`. The public names are loaded at their first use, so that
`import quant` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quant.checkpoint.source import Source
    from quant.conversion.conversion import Progress, convert
    from quant.conversion.listing import Listing, make_listing
    from quant.conversion.recipe import Recipe
    from quant.errors import QuantError
    from quant.formats.qtensor import QTensor
    from quant.ops.linear import backend, linear
    from quant.ops.quantize import quantize
    from quant.pack.pack import Pack
    from quant.pack.verify import verify

_MODULES = {
    "convert": "conversion.conversion",
    "Progress": "conversion.conversion",
    "QuantError": "errors",
    "backend": "ops.linear",
    "linear": "ops.linear",
    "Pack": "pack.pack",
    "QTensor": "formats.qtensor",
    "quantize": "ops.quantize",
    "Listing": "conversion.listing",
    "make_listing": "conversion.listing",
    "Recipe": "conversion.recipe",
    "verify": "pack.verify",
    "Source": "checkpoint.source",
}

__all__ = [
    "Listing",
    "Pack",
    "Progress",
    "QTensor",
    "QuantError",
    "Recipe",
    "Source",
    "backend",
    "convert",
    "linear",
    "make_listing",
    "quantize",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'quant' has no attribute {name!r}")
    value = getattr(import_module(f"quant.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
