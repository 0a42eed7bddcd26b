"""What can go wrong between a checkpoint and a pack. Messages are sentences; the CLI maps classes to exit
codes."""

from __future__ import annotations


class QuantError(Exception):
    """Root of everything that this package raises on purpose."""


class BadCheckpoint(QuantError):  # noqa: N818
    """The source folder is incomplete, damaged or no MiMo-V2 checkpoint."""


class BadPack(QuantError):  # noqa: N818
    """The folder is no pack, half a pack, a damaged pack or one from a newer version."""


class BadRecipe(QuantError):  # noqa: N818
    """The request contradicts itself, the source, or what an earlier run began."""


class NoSpace(QuantError):  # noqa: N818
    """The disk is too full for the pack."""


class NotWritable(QuantError):  # noqa: N818
    """The target can not be written, or is in use."""
