"""A pretended CUDA device, for machines without one: tensors that say they lie on cuda:0 and lie in main memory.

What a program does with its device is then what it would do on a GPU: an operation on tensors of both sides fails as
it would there, native kernels get no address, and a copy on a stream of its own is put off until somebody waits for
it, so that a missing wait shows. Graphs are pretended too (`recording.py`). It says nothing about speed, about memory
that runs out, or about hazards between kernels, which run at once here. Triton's kernels run in its interpreter or,
since that takes a second for a matrix of thousands of rows, are replaced by the native ones.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from localmimo.model.attention import Rows
from quant import gpu
from quant.formats.page import PageLayout
from quant.formats.qtensor import QTensor
from quant.kernels import attention
from quant.ops.experts import experts as run_pages
from quant.ops.experts import in_order
from quant.ops.linear import linear
from tests.gpu import interpreter, recording

Tensor = torch.Tensor
DEVICE = torch.device("cuda", 0)
MOVING = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype_layout)
# A CUDA tensor may be indexed by indices in main memory.
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)


class There(Tensor):
    """A tensor on the pretended device, around one in main memory."""

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined,no-any-return]
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device=DEVICE, requires_grad=False,
        )  # fmt: skip

    def __init__(self, here: Tensor) -> None:
        self.here = here

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"There({self.here!r})"

    # Python's indexing asks for a guard of the device, which a build without CUDA does not have.
    def __getitem__(self, at: Any) -> Any:
        if any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(at)):
            recording.demand_running("a mask says how many")
        return made(lambda: self.here[tree_map(unwrapped, at)], [self.here])

    def __setitem__(self, at: Any, value: Any) -> None:
        if isinstance(value, Tensor) and not isinstance(value, There) and value.dim():
            raise RuntimeError(f"cuda:0 gets {list(value.shape)} from cpu: assign what lies there, or copy_.")
        written(lambda: self.here.__setitem__(tree_map(unwrapped, at), unwrapped(value)))

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:  # type: ignore[override]
        return copy(self, self.here, unwrapped(source), source)

    def contiguous(self, **_: object) -> Tensor:  # type: ignore[override]
        return self if self.here.is_contiguous() else made(self.here.contiguous, [self.here])  # type: ignore[no-any-return]

    def __eq__(self, other: object) -> Tensor:  # type: ignore[override]
        return torch.eq(self, other)  # type: ignore[call-overload,no-any-return]

    __hash__ = Tensor.__hash__

    def nonzero(self) -> Tensor:
        recording.demand_running("nonzero")
        return wrapped(self.here.nonzero())  # type: ignore[no-any-return]

    def __invert__(self) -> Tensor:
        return torch.bitwise_not(self)

    def __int__(self) -> int:
        return int(asked(self))

    def __float__(self) -> float:
        return float(asked(self))

    def __bool__(self) -> bool:
        return bool(asked(self))

    def __index__(self) -> int:
        return int(asked(self))

    def tolist(self) -> Any:
        return asked(self).tolist()

    def numpy(self, **_: object) -> Any:  # type: ignore[override]
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return dispatch(func, args, kwargs or {})


def asked(there: There) -> Tensor:
    """The device is waited for, and says what it holds."""
    recording.demand_running("a value is asked for")
    return there.here


def made(job: Callable[[], Any], sources: list[Tensor], trial: Callable[[], Any] | None = None) -> Any:
    """What the device makes: now, or when a graph is replayed. trial: gives the shapes and changes nothing."""
    graph = recording.NOW.graph
    if graph is None:
        return tree_map(wrapped, job())
    return tree_map(wrapped, graph.add(job, (trial or job)(), sources))


def written(job: Callable[[], object]) -> None:
    """What the device changes: now, or when a graph is replayed."""
    graph = recording.NOW.graph
    job() if graph is None else graph.add_write(job)


def unwrapped(value: Any) -> Any:
    return value.here if isinstance(value, There) else value


def wrapped(value: Any) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, There):
        return value
    with torch.inference_mode(False):  # so that views of it can be made in and out of that mode
        return There(value)


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation in main memory, as the device that it says it is on would."""
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    inside = any(isinstance(x, There) for x in leaves)
    device = kwargs.get("device")
    device = None if device is None else torch.device(device)
    here = tree_map(unwrapped, args), tree_map(unwrapped, {**kwargs, **({"device": "cpu"} if device else {})})
    if "pin_memory" in here[1]:
        here[1]["pin_memory"] = None
    if func is torch.ops.aten.copy_.default:
        return copy(args[0], here[0][0], here[0][1], args[1])
    goes = device.type == "cuda" if device is not None else inside
    if func in MOVING and goes != inside:
        recording.demand_running("a copy from or to the host")
    if func is torch.ops.aten._to_copy.default:
        if recording.recording() and goes:
            return made(lambda: func(*here[0], **here[1]), [])
        out = func(*here[0], **here[1])
        out = out.clone() if out is here[0][0] else out
        return wrapped(out) if goes else out
    if not inside:
        if device is not None and device.type == "cuda":
            return made(lambda: func(*here[0], **here[1]), [])
        return func(*here[0], **here[1])
    _demand_one_side(func, leaves)
    if recording.recording():
        return _recorded(func, args, kwargs, here)
    out = func(*here[0], **here[1])
    if func is torch.ops.aten._local_scalar_dense.default or not isinstance(out, (Tensor, tuple, list)):
        return out
    if device is not None and device.type == "cpu":
        return out
    for given, plain in zip(tree_leaves(args), tree_leaves(here[0]), strict=True):
        if out is plain and isinstance(given, There):
            return given  # written in place
    return tree_map(wrapped, out)


ASKING = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "_unique2",
    "unique_dim",
    "masked_select",
    "equal",
    "is_nonzero",
)


def _recorded(func: Any, args: Any, kwargs: dict[str, Any], here: tuple[Any, dict[str, Any]]) -> Any:
    """An operation of the device while a graph records."""
    if func.overloadpacket.__name__ in ASKING:
        recording.demand_running(str(func))
    if func._schema.is_mutable:
        written(lambda: func(*here[0], **here[1]))
        changed = [arg.alias_info is not None and arg.alias_info.is_write for arg in func._schema.arguments]
        return next((x for x, it in zip(args, changed, strict=False) if it), kwargs.get("out"))
    return made(lambda: func(*here[0], **here[1]), [x for x in tree_leaves(here) if isinstance(x, Tensor)])


def copy(target: Tensor, to: Tensor, source: Tensor, given: object = None) -> Tensor:
    """`copy_`, put off where it was given to a stream of its own."""
    if recording.recording():
        if not (isinstance(target, There) and isinstance(given, There)):
            recording.demand_running("a copy from or to the host")
        written(lambda: to.copy_(source))
        return target
    if HERE.stream is not None:
        HERE.stream.later(lambda: to.copy_(source))
    else:
        to.copy_(source)
    return target


def _demand_one_side(func: Any, leaves: list[Tensor]) -> None:
    elsewhere = [x for x in leaves if not isinstance(x, There) and x.dim()]
    if func in INDEXING:
        elsewhere = [x for x in elsewhere if x.dtype not in (torch.int64, torch.int32, torch.bool)]
        elsewhere += [x for x in leaves[:1] if not isinstance(x, There)]
    if elsewhere:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {func} found cuda:0 and cpu "
            f"({[(type(x).__name__, list(x.shape)) for x in leaves]})."
        )


class Factories(TorchDispatchMode):
    """Tensors that are made on the device from nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return dispatch(func, args, kwargs or {})


class Here(threading.local):
    """What a thread gives its copies to; None: they are done at once."""

    stream: Stream | None = None


HERE = Here()


class Stream:
    """A stream that does its copies as late as it may."""

    def __init__(self, device: object = None) -> None:
        self.waiting: deque[Callable[[], object]] = deque()

    def later(self, job: Callable[[], object]) -> None:
        self.waiting.append(job)

    def synchronize(self) -> None:
        recording.demand_running("a wait")
        while self.waiting:
            self.waiting.popleft()()

    def wait_stream(self, other: Stream) -> None:
        other.synchronize()

    def wait_event(self, event: Event) -> None:
        event.synchronize()


class Event:
    """How far a stream had come when it was recorded."""

    def __init__(self, **_: object) -> None:
        self._stream, self._jobs = MAIN, []

    def record(self, stream: Stream) -> None:
        self._stream, self._jobs = stream, list(stream.waiting)

    def synchronize(self) -> None:
        recording.demand_running("a wait")
        while any(job in self._stream.waiting for job in self._jobs):
            self._stream.waiting.popleft()()


MAIN = Stream()


@contextmanager
def on(stream: Stream) -> Iterator[None]:
    before = HERE.stream
    HERE.stream = None if stream is MAIN else stream
    try:
        yield
    finally:
        HERE.stream = before


def _run_here(original: Callable[..., Any]) -> Callable[..., Any]:
    """Triton's interpreter reads and writes memory: give it the tensors that lie there."""

    def launch(self: Any, *args: Any, **named: Any) -> None:
        here = list(map(unwrapped, args)), {k: unwrapped(v) for k, v in named.items()}
        written(lambda: original(self, *here[0], **here[1]))

    return launch


def linear_like(x: Tensor, q: QTensor) -> Tensor:
    return unwrapped(x).new_empty(*x.shape[:-1], q.shape[0])


def attend_like(joined: Tensor, *_: Tensor, heads: int, head_dims: tuple[int, int], **facts: Any) -> Tensor:
    return unwrapped(joined).new_empty(len(joined), heads * head_dims[1])


def experts_like(x: Tensor, layout: PageLayout, *tensors: Tensor) -> Tensor:
    return torch.empty(*tensors[-1].shape, layout.hidden)


def combine_like(rows: Tensor) -> Tensor:
    return torch.empty(len(rows), rows.shape[2])


def _as_one(name: str) -> Callable[..., Any]:
    """A kernel that a graph holds as it is; while one records only the shape of what it makes is known."""
    kernel, like = globals()[f"native_{name}"], globals()[f"{name}_like"]

    def launch(*args: Any, **named: Any) -> Any:
        return made(lambda: unwrapped(kernel(*args, **named)), [], lambda: like(*args, **named))

    return launch


def native_linear(x: Tensor, q: QTensor) -> Tensor | None:
    """`quant.gpu.linear` by the CPU's kernels."""
    plain = QTensor(q.codec, q.shape, {name: unwrapped(part) for name, part in q.parts.items()})
    return wrapped(linear(unwrapped(x), plain))  # type: ignore[no-any-return]


def native_product(x: Tensor, q: QTensor, *, unpacked: bool) -> Tensor:
    """`quant.gpu.product` by the CPU's kernels, one way as the other."""
    y = native_linear(x, q)
    assert y is not None
    return y


def native_attends(joined: Tensor, keys: Tensor, head_dims: tuple[int, int]) -> bool:
    """`quant.gpu.attends` where the CPU's kernels attend."""
    return True


def native_attend(
    joined: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor,
    *, positions: Tensor, sink: Tensor | None, table: Tensor | None = None, **facts: Any,
) -> Tensor:  # fmt: skip
    """`quant.gpu.attend` by the CPU's kernels."""
    joined, cos, sin, keys, values, positions = map(unwrapped, (joined, cos, sin, keys, values, positions))
    position, end = int(positions[0]), int(positions[-1]) + 1
    rows = Rows(keys, values, table=unwrapped(table))
    if table is not None:  # as they would lie without blocks
        keys, values = (x.contiguous() for x in rows.get(0, end))
    out = attention.attend(
        joined.float(), cos, sin, keys, values, position=position, sink=unwrapped(sink), **facts
    )
    if table is not None:
        rows.put(position, keys[:, position:], values[:, position:])
    return wrapped(out.to(joined.dtype))  # type: ignore[no-any-return]


def native_experts(
    x: Tensor, layout: PageLayout, slab: Tensor, slots: Tensor, chosen: Tensor, weights: Tensor
) -> Tensor:
    """`quant.gpu.experts` by the CPU's kernels."""
    x, slab, slots, chosen, weights = map(unwrapped, (x, slab, slots, chosen, weights))
    out = torch.zeros(chosen.numel(), layout.hidden)
    for expert in chosen.unique().tolist():
        if slots[expert] >= 0:
            places = (chosen.reshape(-1) == expert).nonzero()[:, 0]
            run_pages(x, layout, [slab[slots[expert]]], places, (0, len(places)), weights, out)
    return wrapped(out.view(*chosen.shape, -1))  # type: ignore[no-any-return]


def native_combine(rows: Tensor) -> Tensor:
    """`quant.gpu.combine` by the CPU."""
    return wrapped(in_order(unwrapped(rows)))  # type: ignore[no-any-return]


class Runtime:
    """The part of the CUDA runtime that locks memory; `most`: stretches that it lets be locked."""

    def __init__(self, most: int) -> None:
        self.locked: set[int] = set()
        self.most = most

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        assert address % 4096 == nbytes % 4096 == 0 and address not in self.locked
        if len(self.locked) == self.most:
            return 2
        self.locked.add(address)
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.locked.remove(address)
        return 0


@contextmanager
def device(
    *,
    total_bytes: int = 8 << 30,
    free_bytes: int | None = None,
    capability: tuple[int, int] = (9, 0),
    most_locked: int = 1 << 30,
    triton: bool = False,
) -> Iterator[torch.device]:
    """A CUDA device for as long as the block lasts; its kernels are native ones unless Triton is asked for."""
    properties = SimpleNamespace(
        name="Pretended GPU", total_memory=total_bytes, shared_memory_per_block_optin=1 << 30,
        major=capability[0], minor=capability[1], multi_processor_count=4,
    )  # fmt: skip
    runtime = Runtime(most_locked)
    replaced = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda *_: capability,
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (total_bytes if free_bytes is None else free_bytes, total_bytes),
        "device": lambda *_: nullcontext(),
        "cudart": lambda: runtime,
        "Stream": Stream,
        "Event": Event,
        "stream": on,
        "current_stream": lambda *_: MAIN,
        "CUDAGraph": recording.Graph,
        "graph": recording.record,
        "graph_pool_handle": lambda: (0, 1),
        "max_memory_allocated": lambda *_: total_bytes // 2,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "init": lambda: None,
        "_lazy_init": lambda: None,
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch.version, "cuda", "13.0"))
        if triton:
            assert interpreter.running()
            from triton.runtime.interpreter import GridExecutor

            stack.enter_context(patch.object(GridExecutor, "__call__", _run_here(GridExecutor.__call__)))
        else:
            stack.enter_context(patch.object(gpu, "product", native_product))
            for name in ("linear", "experts", "combine", "attends", "attend"):
                kernel = native_attends if name == "attends" else _as_one(name)
                stack.enter_context(patch.object(gpu, name, kernel))
        gpu._capable.cache_clear()
        stack.enter_context(Factories())
        yield DEVICE
    gpu._capable.cache_clear()
