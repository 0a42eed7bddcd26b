"""The errors that this package raises. Messages are sentences; the command line gives each class an exit code."""

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
    """The output folder can not be written, or another process uses it."""


class Unreachable(QuantError):
    """The hub can not be reached, or a file on it may not be read."""
