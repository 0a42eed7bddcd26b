"""Router traces: which experts each token used in each layer, as JSON lines, written while a model runs and read back.

One line per token and layer, in order: {"step": 0, "layer": 1, "experts": [3, 17]}. Knows the file; no policy.
"""

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from localmimo.errors import BadRequest
from localmimo.system.json_files import JsonLines

MAX_LINE_BYTES = 1 << 16
MAX_REQUESTS = 1 << 24  # 44,000 tokens of MiMo-V2-Flash
MAX_LAYERS = 1 << 10
MAX_EXPERTS = 1 << 12


class TraceWriter:
    """Writes a trace, line by line."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path, "--record", append=False)

    def write(self, step: int, layer: int, experts: Sequence[int]) -> None:
        """The experts that one token (the `step`-th) uses in one layer."""
        self._lines.write({"step": step, "layer": layer, "experts": [*map(int, experts)]})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.__exit__(kind, error, trace)


@dataclass(slots=True)
class Trace:
    """A trace in memory: line i is about layers[i] and experts[ends[i - 1] : ends[i]]."""

    layers: "array[int]" = field(default_factory=lambda: array("H"))
    ends: "array[int]" = field(default_factory=lambda: array("I"))
    experts: "array[int]" = field(default_factory=lambda: array("H"))
    n_steps: int = 0

    @property
    def n_requests(self) -> int:
        return len(self.experts)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        """Layer and experts of each line."""
        begin = 0
        for layer, end in zip(self.layers, self.ends, strict=True):
            yield layer, self.experts[begin:end].tolist()
            begin = end

    def pages(self, n_experts: int) -> NDArray[np.int64]:
        """Every request in order, as layer * n_experts + expert."""
        ends = np.array(self.ends, dtype=np.int64)
        layers = np.repeat(np.array(self.layers, dtype=np.int64), np.diff(ends, prepend=0))
        return layers * n_experts + np.array(self.experts, dtype=np.int64)

    @property
    def n_experts(self) -> int:
        """One more than the highest expert."""
        return max(self.experts, default=-1) + 1

    def add(self, layer: int, experts: Sequence[int]) -> None:
        self.layers.append(layer)
        self.experts.extend(experts)
        self.ends.append(len(self.experts))


def read_trace(path: Path) -> Trace:
    """Read a trace. Raises BadRequest naming the line that is wrong."""
    trace, last = Trace(), (-1, -1)
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            try:
                step, layer, experts = _parse(line)
                if (step, layer) <= last:
                    raise ValueError(
                        f"step {step}, layer {layer} comes after step {last[0]}, layer {last[1]}"
                    )
                if len(trace.experts) + len(experts) > MAX_REQUESTS:
                    raise ValueError(f"the trace has more than {MAX_REQUESTS:,} requests")
            except ValueError as error:
                raise BadRequest(f"{path}, line {number}: {error}.") from None
            trace.n_steps += step != last[0]
            trace.add(layer, experts)
            last = (step, layer)
    if not trace.n_requests:
        raise BadRequest(f"{path} is empty: a trace has one JSON line per token and layer.")
    return trace


def _parse(line: bytes) -> tuple[int, int, list[int]]:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES:,} bytes")
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(entry, dict):
        raise ValueError('not an object such as {"step": 0, "layer": 1, "experts": [3, 17]}')
    step, layer = _number(entry, "step", 1 << 62), _number(entry, "layer", MAX_LAYERS)
    experts = entry.get("experts")
    if not isinstance(experts, list) or not experts:
        raise ValueError('"experts" must be a list of numbers')
    if not all(type(expert) is int and 0 <= expert < MAX_EXPERTS for expert in experts):
        raise ValueError(f'"experts" must be whole numbers from 0 to {MAX_EXPERTS - 1}')
    if len(set(experts)) < len(experts):
        raise ValueError('"experts" names one twice')
    return step, layer, experts


def _number(entry: dict[str, Any], key: str, limit: int) -> int:
    value = entry.get(key)
    if type(value) is not int or not 0 <= value < limit:
        raise ValueError(f'"{key}" must be a whole number from 0 to {limit - 1}')
    return value
