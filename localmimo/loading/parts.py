"""Parts of an engine: an opened pack, its plan, its experts, its weights; opened and closed together.

Knows the order in which the parts need each other. Must not know prompts, answers or callers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from localmimo.decode.cuda_graphs import Graphs
from localmimo.decode.draft_depth import DepthPolicy, depth_policy_of
from localmimo.decode.mtp import DraftHead, load_heads
from localmimo.decode.session import Session
from localmimo.errors import BadModel, BadPack, DoesNotFit, LocalMimoError
from localmimo.experts.compute.cpu_runner import ExpertRunner
from localmimo.experts.compute.hybrid_runner import HybridRunner, runner_of
from localmimo.hardware.device import Device, out_of_memory
from localmimo.hardware.unpack_threshold import settle
from localmimo.kv.session_file import SessionIdentity
from localmimo.loading.embedded import embedded_pack
from localmimo.loading.expert_cache import ExpertCache
from localmimo.loading.options import LoadOptions
from localmimo.mini import NAME
from localmimo.model.config import ModelConfig
from localmimo.model.transformer import Transformer
from localmimo.model.weight_shapes import check_shapes
from localmimo.model.weights import OnDevice, OnProgress, ReportedWeights, load_weights
from localmimo.planning.memory import Plan
from quant import Pack
from quant.errors import BadPack as QuantBadPack
from quant.errors import NoSpace, QuantError
from quant.ops.linear import backend


@dataclass(frozen=True, slots=True)
class EngineParts:
    """Everything that an engine holds. `close` stops reading, saves the router statistics and frees memory."""

    pack: Pack
    config: ModelConfig
    options: LoadOptions  # with the device and the types that were found
    device: Device
    plan: Plan
    expert_cache: ExpertCache
    model: Transformer
    unpacked_from: dict[str, int]  # tokens from which on a GPU unpacks packed matrices, by codec
    experts: ExpertRunner | HybridRunner
    graphs: Graphs | None
    heads: tuple[DraftHead, ...]
    close: Callable[[], None]

    @property
    def identity(self) -> SessionIdentity:
        """What a saved session must agree with."""
        return SessionIdentity(
            model=self.pack.name,
            pack=self.pack.id,
            config=hashlib.sha256(repr(self.config).encode()).hexdigest(),
            kv=_name(self.options.kv_dtype),
            dtype=_name(self.options.activation_dtype),
        )

    def new_session(self) -> Session:
        """A session with memory for the whole context."""
        return Session(
            self.model,
            self.experts,
            self.plan.context,
            self.options.kv_dtype,
            segment_tokens=self.plan.stretch_tokens,
            identity=self.identity,
            heads=self.heads,
            shrink=(self.graphs or self.experts).shrink,
            pool=self.expert_cache.store.gpu,
            graphs=self.graphs,
        )

    def new_depth_policy(self) -> DepthPolicy:
        """Decides how many tokens are drafted, as the options say."""
        return depth_policy_of(self.options.draft, self.plan.n_drafts)

    def effective(self) -> dict[str, Any]:
        """The configuration in force, for people and for JSON."""
        return {
            "model": self.pack.name,
            "pack": str(self.pack.path),
            "pack_id": self.pack.id,
            "experts": "+".join(self.pack.layouts),
            "device": str(self.device),
            "gpu": self.device.title or None,
            "note": self.device.note or None,
            "dtype": _name(self.options.activation_dtype),
            "kv_dtype": _name(self.options.kv_dtype),
            "kernels": f"triton+{backend()}" if self.device.is_gpu else backend(),
            "graphs": None if self.graphs is None else self.graphs.refused or "on",
            "unpacked_from": self.unpacked_from or None,
            "threads": torch.get_num_threads(),
            "window_keys": self.config.mtp_layer.window,
            "context": self.plan.context,
            "draft": {"setting": self.options.draft, "heads": self.plan.n_drafts},
            "max_batch": self.plan.max_batch,
            **self.expert_cache.facts(),
            "prefetch": self.options.prefetch,
            "trust": self.options.trust,
            "plan": self.plan.as_dict(),
        }


def open_parts(path: str | Path | None, options: LoadOptions, on_progress: OnProgress) -> EngineParts:
    """Open a pack and everything that runs it; None and "mimo-mini": the embedded model.

    Where a step fails, what was opened before it is closed again. Raises BadPack, BadModel, NoDevice, DoesNotFit or
    BadRequest.
    """
    with _local_errors(), ExitStack() as opened:
        folder = embedded_pack() if path is None or path == NAME else Path(path).expanduser()
        pack = opened.enter_context(Pack.open(folder))
        config = _config(pack, options.window_keys)
        options, device, plan = options.place(pack, config)
        gpu = device.torch() if device.is_gpu else None
        expert_cache = opened.enter_context(
            closing(
                ExpertCache(
                    pack, config, plan,
                    profile=options.profile, prefetch=options.prefetch, trust=options.trust,
                    device=gpu, dtype=options.activation_dtype,
                )
            )
        )  # fmt: skip
        dense = ReportedWeights(pack, plan.n_drafts, on_progress)
        source = dense if gpu is None else OnDevice(dense, gpu)
        model = Transformer(config, load_weights(source, config), options.activation_dtype)
        unpacked_from = _unpack_thresholds(model, device) if gpu is not None else {}
        experts = runner_of(expert_cache.store, plan.page_bytes, gpu)
        graphs = Graphs(model, experts) if isinstance(experts, HybridRunner) else None
        heads = load_heads(source, model, plan.n_drafts)
        return EngineParts(
            pack, config, options, device, plan, expert_cache, model, unpacked_from, experts, graphs, heads,
            close=opened.pop_all().close,
        )  # fmt: skip


@contextmanager
def _local_errors() -> Iterator[None]:
    """Turn the errors of `quant` and of torch into those of this package."""
    try:
        yield
    except QuantBadPack as error:
        raise BadPack(str(error)) from error
    except NoSpace as error:
        raise DoesNotFit(str(error), what="disk") from error
    except QuantError as error:
        raise LocalMimoError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error) from error


def _config(pack: Pack, window_keys: int | None) -> ModelConfig:
    config = ModelConfig.parse(pack.config, window_keys)
    if pack.page is None or not config.moe_layers:
        raise BadModel(
            f"{pack.path} has no routed experts; localmimo runs MiMo-V2's mixture-of-experts models."
        )
    check_shapes(pack, config)
    return config


def _unpack_thresholds(model: Transformer, device: Device) -> dict[str, int]:
    """From how many tokens on packed matrices are unpacked on the GPU; with float32 activations that is fixed."""
    if model.dtype != torch.bfloat16:
        return {}
    attention = (block.attention for block in model.weights.blocks)
    matrices = (matrix for weights in attention for matrix in (weights.qkv, weights.o))
    return settle(matrices, model.device, device.title)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
