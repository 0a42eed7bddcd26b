"""What can go wrong between a checkpoint and a pack. Messages are sentences; the CLI maps classes to exit
codes."""

from __future__ import annotations


class QuantError(Exception):
    """Root of everything that this package raises on purpose."""


class BadCheckpoint(QuantError):
    """The source folder is incomplete, damaged or no MiMo-V2 checkpoint."""


class BadPack(QuantError):
    """The folder is no pack, half a pack, a damaged pack or one from a newer version."""


class BadRecipe(QuantError):
    """The request contradicts itself, the source, or what an earlier run began."""


class NoSpace(QuantError):
    """The disk is too full for the pack."""


class NotWritable(QuantError):
    """The target can not be written, or is in use."""


class Unreachable(QuantError):
    """The hub, or a file on it, can not be reached or may not be read."""
