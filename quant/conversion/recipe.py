"""The recipe: which codec each canonical tensor gets.

It must not write anything, nor import torch: a dry run computes the size of a whole model from headers.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from quant.checkpoint.pieces import Matrix
from quant.errors import BadRecipe
from quant.files.bounded import CONFIG_BYTES, read_small
from quant.formats.codec import codec

if TYPE_CHECKING:
    from quant.checkpoint.source import Source

KEEP = "keep"
ROW_LOOKUP = ("embed", "router.weight")  # embeddings are read by row; routers decide by small differences
PRESETS = {  # name -> experts, dense
    "nf4": ("nf4", "int8"),
    "nf4-16": ("nf4-16", "int8"),
    "mxfp4": ("mxfp4", "int8"),
    "int8": ("int8", "int8"),
    "fp8": ("fp8", "int8"),
    "bf16": ("bf16", "bf16"),
}


@dataclass(frozen=True)
class Recipe:
    """Codecs for routed experts and for the dense matrices, and rules (glob over canonical names, codec or
    "keep").

    The first matching rule wins. Vectors, routers and embeddings stay as they are stored; MTP blocks follow
    `dense` but never below eight bits, since a draft that is off costs more time than it saves.
    """

    experts: str = "nf4"
    dense: str = "int8"
    rules: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in (self.experts, self.dense, *(name for _, name in self.rules)):
            if name != KEEP:
                codec(name)

    @classmethod
    def preset(cls, name: str) -> Recipe:
        """A recipe by name; raises BadRecipe naming the known ones."""
        if name not in PRESETS:
            raise BadRecipe(
                f"There is no recipe {name!r}. Known recipes: {', '.join(PRESETS)}, or a .toml file."
            )
        experts, dense = PRESETS[name]
        return cls(experts, dense)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """A TOML file: optional keys `experts` and `dense`, and a table `rules` of "glob" = "codec"."""
        try:
            table = tomllib.loads(read_small(Path(path), CONFIG_BYTES).decode())
        except (OSError, ValueError, RecursionError) as error:
            raise BadRecipe(f"The recipe {path} can not be read: {error}.") from error
        unknown = table.keys() - {"experts", "dense", "rules"}
        rules = table.get("rules", {})
        if unknown or not isinstance(rules, dict):
            raise BadRecipe(
                f"The recipe {path} may hold experts, dense and a table rules, not {sorted(unknown)}."
            )
        values = [table.get("experts", cls.experts), table.get("dense", cls.dense), *rules.values()]
        if not all(isinstance(value, str) for value in values):
            raise BadRecipe(f"The recipe {path}: every codec must be a string.")
        return cls(values[0], values[1], tuple(rules.items()))

    @classmethod
    def of(cls, recipe: Recipe | str | Path | None, *, experts: str = "nf4", dense: str = "int8") -> Recipe:
        """What `convert` accepts: a recipe, a preset's name, a TOML file, or None for `experts` and
        `dense`."""
        match recipe:
            case None:
                return cls(experts, dense)
            case Recipe():
                return recipe
        return cls.load(recipe) if str(recipe).endswith(".toml") else cls.preset(str(recipe))

    def keeping(self, *globs: str) -> Recipe:
        """The same recipe with some tensors kept as they are stored."""
        return replace(self, rules=(*((glob, KEEP) for glob in globs), *self.rules))

    def as_dict(self) -> dict[str, object]:
        return {"experts": self.experts, "dense": self.dense, "rules": [list(rule) for rule in self.rules]}

    @classmethod
    def from_dict(cls, facts: Mapping[str, object]) -> Recipe:
        """The inverse of `as_dict`."""
        match facts:
            case {"experts": str(experts), "dense": str(dense), "rules": list(rules)} if all(
                isinstance(rule, list | tuple) and len(rule) == 2 for rule in rules
            ):
                return cls(experts, dense, tuple((str(glob), str(name)) for glob, name in rules))
        raise BadRecipe(f"This is no recipe: {facts!r}.")

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()

    def effective(self, source: Source) -> Recipe:
        """The recipe as it will be carried out: experts that ship as mxfp4 stay mxfp4 under any four-bit
        codec.

        A second rounding to four bits would lose accuracy and save nothing.
        """
        four_bit = self.experts != KEEP and codec(self.experts).kind == "four"
        if four_bit and _expert_dtypes(source) == {"mxfp4"}:
            return replace(self, experts="mxfp4")
        return self

    def codec_of(self, matrix: Matrix) -> str:
        """The codec of one tensor; for a vector the dtype in which it is kept."""
        if len(matrix.shape) == 1:
            return _kept(matrix)
        asked = self._asked(matrix.name)
        name = _kept(matrix) if asked == KEEP else asked
        if matrix.name.endswith(ROW_LOOKUP) and codec(name).kind != "plain":
            raise BadRecipe(f"{matrix.name} can only be bf16 or f32, not {name}.")
        return name

    def _asked(self, name: str) -> str:
        for glob, chosen in self.rules:
            if fnmatchcase(name, glob):
                return chosen
        if name.endswith(ROW_LOOKUP):
            return KEEP
        if ".experts." in name:
            return self.experts
        if name.startswith("mtp.") and self.dense != KEEP and codec(self.dense).kind == "four":
            return "int8"
        return self.dense


def _kept(matrix: Matrix) -> str:
    """The codec that changes a stored tensor least. FP8 with a shard-wise grid has none and becomes bf16."""
    match matrix.dtype:
        case "fp8":
            return "fp8" if matrix.plain_fp8(codec("fp8").block) else "bf16"
        case "f16":
            return "f32"
    return matrix.dtype


def _expert_dtypes(source: Source) -> set[str]:
    return {matrix.dtype for name, matrix in source.matrices.items() if ".experts." in name}
