"""The options of opening a pack, declared once, checked, and the plan that follows from them on this machine.

The keywords of `load` and the flags of chat, serve, bench and perplexity come from this class. Facts and arithmetic;
opens nothing. Imports no torch before a data type is asked for: the command line shows the help.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from localmimo.decode.draft_depth import Draft, check_draft
from localmimo.errors import BadRequest, DoesNotFit, NoDevice
from localmimo.hardware.device import CPU, Device, check_device, find_device
from localmimo.hardware.host import Machine
from localmimo.hardware.units import format_bytes, parse_bytes
from localmimo.limits import DEFAULT_CONTEXT, MAX_BATCH, MAX_DRAFTS, SLACK
from localmimo.option import option, options_of
from localmimo.planning.memory import Plan, make_plan

if TYPE_CHECKING:
    import torch

    from localmimo.model.config import ModelConfig
    from quant import Pack

Dtype = Literal["auto", "float32", "bfloat16"]
Kv = Literal["auto", "bf16", "int8", "float32"]
KV_DTYPES = {"bf16": "bfloat16", "int8": "int8", "float32": "float32"}  # as torch names them


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """The keywords of `load`. Raises BadRequest where one of them makes no sense."""

    context: int | None = option(
        "tokens", flags=("-c", "--context"), metavar="N", help="Positions of the context, such as 32k."
    )
    ram: str | int | None = option(
        "text",
        flags=("--ram",),
        metavar="SIZE",
        help="RAM budget, such as 96GiB.",
        default_help="what is free",
    )
    vram: str | int | None = option(
        "text", flags=("--vram",), metavar="SIZE", help="Of a GPU's memory, such as 22GiB.",
        default_help="what is free",
    )  # fmt: skip
    device: str = option(
        "text", "auto", flags=("--device",), metavar="NAME",
        help="cpu, cuda or cuda:N; auto takes a GPU that can be used and is large enough.",
    )  # fmt: skip
    dtype: Dtype = option(
        "text", "auto", flags=("--dtype",), metavar="TYPE", help="Of activations: auto, float32, bfloat16."
    )
    kv: Kv = option(
        "text", "auto", flags=("--kv",), metavar="TYPE",
        help="Of the KV cache: auto, bf16, int8 (half of it), float32.",
    )  # fmt: skip
    window_keys: int | None = option("count", help="Keys that a window layer sees, with the token itself.")
    profile: str | None = option(
        "text", "default", flags=("--profile",), metavar="NAME",
        help='Router statistics to start from and to add to, kept with the pack; "none" keeps none.',
    )  # fmt: skip
    prefetch: bool = option("switch", True, flags=("--no-prefetch",), help="Do not read experts ahead.")
    trust: bool = option("switch", False, flags=("--trust",), help="Do not check the pages' checksums.")
    draft: Draft = option(
        "text", "auto", flags=("--draft",), metavar="N", choices=("auto", "0", "1", "2", "3"),
        help="Tokens that the model's draft heads propose at a time, 0 to 3, or auto: what pays. "
        "They change no answer.",
    )  # fmt: skip
    max_batch: int = option("count", 1, help="Sequences that `generate` advances together.")

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.vram is not None and (parse_bytes(self.vram) <= 0 or self.device == "cpu"):
            raise BadRequest(
                f"vram is {self.vram} and the device {self.device}: vram is the memory of a GPU that may be used."
            )
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise BadRequest(f'dtype is "{self.dtype}"; it is one of auto, float32, bfloat16.')
        if self.kv != "auto" and self.kv not in KV_DTYPES:
            raise BadRequest(f'kv is "{self.kv}"; it is one of auto, {", ".join(KV_DTYPES)}.')
        if not 1 <= self.max_batch <= MAX_BATCH:
            raise BadRequest(f"max_batch is {self.max_batch}; it is from 1 to {MAX_BATCH} sequences.")
        object.__setattr__(self, "draft", check_draft(self.draft))  # "2" is 2

    def on(self, device: Device) -> LoadOptions:
        """The same, on the device that was found: activations are bfloat16 on a GPU unless something else is asked."""
        dtype: Dtype = "bfloat16" if self.dtype == "auto" and device.is_gpu else self.dtype
        return replace(self, device=str(device), dtype=dtype, vram=self.vram if device.is_gpu else None)

    @property
    def activation_dtype(self) -> torch.dtype:
        import torch

        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of the KV cache: bfloat16 unless the activations were asked to be float32."""
        import torch

        named = "float32" if self.dtype == "float32" else "bf16"
        found = getattr(torch, KV_DTYPES[named if self.kv == "auto" else self.kv])
        assert isinstance(found, torch.dtype)
        return found

    def place(self, pack: Pack, config: ModelConfig) -> tuple[LoadOptions, Device, Plan]:
        """Find the device and plan for it; where "auto" found a GPU that is too small, the CPU, saying so.

        Raises BadRequest, NoDevice, or DoesNotFit with the numbers.
        """
        device = find_device(self.device)
        if self.vram is not None and not device.is_gpu:
            raise NoDevice(
                device.note or "vram was given and CUDA sees no GPU on this machine: leave vram out."
            )
        try:
            return self.on(device), device, self.on(device).plan(pack, config, device)
        except DoesNotFit as error:
            if not device.is_gpu or self.device != "auto" or self.vram is not None:
                raise
            device = Device(note=str(error))
            return self.on(device), device, self.on(device).plan(pack, config, device)

    def plan(self, pack: Pack, config: ModelConfig, device: Device = CPU) -> Plan:
        """What is kept in which memory. Raises BadRequest, or DoesNotFit with the numbers.

        Draft heads are left out where they are not asked for by number and do not fit.
        """
        n_heads = sum(pack.has(f"mtp.{k}.proj") for k in range(MAX_DRAFTS))
        try:
            return self._plan_with(
                pack, config, device, n_heads if self.draft == "auto" else min(self.draft, n_heads)
            )
        except DoesNotFit:
            if self.draft != "auto":
                raise
            return self._plan_with(pack, config, device, 0)

    def _plan_with(self, pack: Pack, config: ModelConfig, device: Device, n_drafts: int) -> Plan:
        assert pack.page is not None
        return make_plan(
            config,
            dense_bytes=dense_bytes(pack, n_drafts),
            page_bytes=pack.page.bytes,
            context=self._context(config),
            ram_bytes=self._budget(),
            kv_item_bytes=self.kv_dtype.itemsize,
            slack=SLACK,
            n_drafts=n_drafts,
            max_batch=self.max_batch,
            vram_bytes=self._vram(device) if device.is_gpu else None,
            lookup_bytes=pack.tensors["embed"].nbytes,
        )

    def _vram(self, device: Device) -> int:
        budget = device.automatic_bytes if self.vram is None else parse_bytes(self.vram)
        if budget > device.free_bytes:
            what = "has" if budget > device.total_bytes else "has free"
            n_bytes = device.total_bytes if budget > device.total_bytes else device.free_bytes
            raise DoesNotFit(
                f"The VRAM budget is {format_bytes(budget)} and {device} ({device.title}) {what} "
                f"{format_bytes(n_bytes)}: give a smaller vram=.",
                what="VRAM",
                needed_bytes=budget,
                budget_bytes=n_bytes,
            )
        return budget

    def _context(self, config: ModelConfig) -> int:
        context = min(DEFAULT_CONTEXT, config.max_context) if self.context is None else self.context
        if not 1 <= context <= config.max_context:
            raise BadRequest(
                f"The context is {context:,}; this model has from 1 to {config.max_context:,} positions."
            )
        return context

    def _budget(self) -> int:
        machine = Machine.probe()
        budget = machine.automatic_ram_bytes if self.ram is None else parse_bytes(self.ram)
        if budget > machine.ram_bytes:
            raise DoesNotFit(
                f"The RAM budget is {format_bytes(budget)} and this machine has "
                f"{format_bytes(machine.ram_bytes)}.",
                what="RAM",
                needed_bytes=budget,
                budget_bytes=machine.ram_bytes,
            )
        return budget


def dense_bytes(pack: Pack, n_drafts: int) -> int:
    """The dense tensors in memory: those of the main model and of so many draft heads."""
    heads = tuple(f"mtp.{k}." for k in range(n_drafts))
    return sum(
        tensor.nbytes
        for name, tensor in pack.tensors.items()
        if name.startswith(heads) or not name.startswith("mtp.")
    )


LOAD_OPTIONS = options_of(LoadOptions)
