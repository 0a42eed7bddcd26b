"""Engine: an opened pack, ready to answer. `load` assembles it; generate, stream, chat, session and logits use it.

The Python API. Knows every room to its left; knows nothing of terminals or HTTP.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import torch
from torch import Tensor

from localmimo.agent import Approve, Run, run_agent
from localmimo.chat.prompt import Prompt, Prompts
from localmimo.chat.stream_parser import StreamParser
from localmimo.chat.template import ChatTemplate
from localmimo.chat.tokenizer import Tokenizer
from localmimo.decode.answer import Answer, Message
from localmimo.decode.batch import Batch
from localmimo.decode.constraint import Constraints
from localmimo.decode.cuda_graphs import Graphs
from localmimo.decode.draft_depth import Draft, depth_policy_of
from localmimo.decode.generation import Generation, PlainTextParser
from localmimo.decode.grammar import Grammar
from localmimo.decode.mtp import load_heads
from localmimo.decode.options import GenerationOptions
from localmimo.decode.sampler import Sampling
from localmimo.decode.session import Progress, Session
from localmimo.decode.speculative import SpeculativeSteps
from localmimo.decode.steps import DraftStats, FinishReason, Stats, Step
from localmimo.errors import BadModel, BadRequest, ContextFull
from localmimo.experts.compute.cpu_runner import Record
from localmimo.experts.compute.hybrid_runner import HybridRunner, runner_of
from localmimo.experts.store.store import PageCounters
from localmimo.hardware.device import out_of_memory
from localmimo.hardware.unpack_threshold import settle
from localmimo.kv.session_file import SessionIdentity
from localmimo.limits import PREFILL_CHUNK
from localmimo.loading.embedded import embedded_pack
from localmimo.loading.expert_cache import ExpertCache
from localmimo.loading.options import Dtype, Kv, LoadOptions
from localmimo.mini import NAME
from localmimo.model.config import ModelConfig
from localmimo.model.transformer import Transformer
from localmimo.model.weight_shapes import check_shapes
from localmimo.model.weights import OnDevice, OnProgress, ReportedWeights, load_weights
from localmimo.tools.tool import LIMIT_S, MAX_CHARS, Tool, tools_of
from quant import Pack
from quant.ops.linear import backend

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Callable[..., Any] | Tool | Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished text."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    stats: Stats


def load(
    path: str | Path | None = None,
    *,
    context: int | None = None,
    ram: str | int | None = None,
    vram: str | int | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    kv: Kv = "auto",
    window_keys: int | None = None,
    profile: str | None = "default",
    prefetch: bool = True,
    trust: bool = False,
    draft: Draft = "auto",
    max_batch: int = 1,
    hear: OnProgress = lambda done, total: None,
) -> "Engine":
    """Open a pack; None and "mimo-mini" open the embedded model.

    context: positions to make room for (default: 32,768 or the model's own limit). ram: bytes or "96GiB", for
    everything but the interpreter and its libraries (default: what is free, less a reserve). device: "cpu", "cuda"
    or "cuda:1"; "auto" is a GPU that can be used and is large enough, else the CPU. vram: of it, for dense weights,
    KV and the hottest experts (default: what is free). dtype: of the activations ("auto": bfloat16 on a GPU). kv:
    of the KV cache, "bf16" unless dtype is "float32"; "int8" takes half of bf16, with a little loss. window_keys:
    keys that a window layer sees, with the token itself (default: the config's). profile: name of the router
    statistics to start from and to add to when the engine closes; None keeps none. prefetch: read ahead of the
    router while that pays. trust: skip the pages' checksums. draft: tokens that the model's draft heads propose at
    a time, 0 to 3; "auto" measures what pays; 0 does not load them. max_batch: timelines that `generate` advances
    together, each with room for the whole context. hear: told of the dense tensors' bytes read, and of how many.
    Raises BadPack, BadModel, NoDevice, or DoesNotFit with the numbers.
    """
    opening = LoadOptions(
        context=context, ram=ram, vram=vram, device=device, dtype=dtype, kv=kv, profile=profile,
        prefetch=prefetch, trust=trust, draft=draft, max_batch=max_batch,
    )  # fmt: skip
    pack = Pack.open(embedded_pack() if path in (None, NAME) else Path(path).expanduser())
    config = ModelConfig.parse(pack.config, window_keys)
    if pack.page is None or not config.moe_layers:
        raise BadModel(
            f"{pack.path} has no routed experts; localmimo runs MiMo-V2's mixture-of-experts models."
        )
    check_shapes(pack, config)
    try:
        return Engine(pack, config, opening, hear)
    except torch.OutOfMemoryError as error:
        raise out_of_memory(error) from error


class Engine:
    """One opened pack. Thread-safe: one generation at a time, the others wait."""

    def __init__(self, pack: Pack, config: ModelConfig, opening: LoadOptions, hear: OnProgress) -> None:
        self.pack = pack
        self.config = config
        opening, self.device, self.plan = opening.place(pack, config)
        self._opening = opening
        gpu = self.device.torch() if self.device.is_gpu else None
        self._pager = ExpertCache(
            pack, config, self.plan,
            profile=opening.profile, prefetch=opening.prefetch, trust=opening.trust,
            device=gpu, dtype=opening.activation_dtype,
        )  # fmt: skip
        self._store = self._pager.store
        dense = ReportedWeights(pack, self.plan.n_drafts, hear)
        source = dense if gpu is None else OnDevice(dense, gpu)
        self._model = Transformer(config, load_weights(source, config), opening.activation_dtype)
        self._unpacked_from = self._crossovers() if self.device.is_gpu else {}
        self._experts = runner_of(self._store, self.plan.page_bytes, gpu)
        self._graphs = Graphs(self._model, self._experts) if isinstance(self._experts, HybridRunner) else None
        self._heads = load_heads(source, self._model, self.plan.n_drafts)
        self._pace = depth_policy_of(opening.draft, self.plan.n_drafts)
        self._timelines: list[Session] = []
        self._holder: int | None = None  # the thread that is using the timeline
        self._lock = threading.Lock()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The pack's tokenizer, opened when text first comes in or goes out. Raises BadModel where it has none."""
        return Tokenizer.open(self.pack.path)

    @cached_property
    def template(self) -> ChatTemplate:
        """The pack's own chat template, or its family's."""
        return ChatTemplate.open(self.pack.path, self.pack.config)

    @cached_property
    def prompts(self) -> Prompts:
        """The way from messages to tokens, with the memory of what was sampled."""
        return Prompts(self.template, self.tokenizer)

    @property
    def context(self) -> int:
        """Positions of a session."""
        return self.plan.context

    @cached_property
    def identity(self) -> SessionIdentity:
        """What a saved session must agree with."""
        return SessionIdentity(
            model=self.pack.name,
            pack=self.pack.id,
            config=hashlib.sha256(repr(self.config).encode()).hexdigest(),
            kv=str(self._opening.kv_dtype).removeprefix("torch."),
            dtype=str(self._opening.activation_dtype).removeprefix("torch."),
        )

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
            "dtype": str(self._opening.activation_dtype).removeprefix("torch."),
            "kv_dtype": str(self._opening.kv_dtype).removeprefix("torch."),
            "kernels": f"triton+{backend()}" if self.device.is_gpu else backend(),
            "graphs": None if self._graphs is None else self._graphs.refused or "on",
            "unpacked_from": self._unpacked_from or None,
            "threads": torch.get_num_threads(),
            "window_keys": self.config.mtp_layer.window,
            "context": self.context,
            "draft": {"setting": self._opening.draft, "heads": self.plan.n_drafts},
            "max_batch": self.plan.max_batch,
            **self._pager.facts(),
            "prefetch": self._opening.prefetch,
            "trust": self._opening.trust,
            "plan": self.plan.as_dict(),
        }

    @property
    def n_slots(self) -> int:
        """Expert slots in use now: fewer than planned while the system is short of memory."""
        return self._store.n_slots

    @property
    def traffic(self) -> PageCounters:
        """What was asked of the expert store since the engine was opened."""
        return self._store.traffic.copy()

    def ahead(self, session: Session, stats: DraftStats) -> SpeculativeSteps:
        """Steps a session with this engine's drafts, as `stream` does, and counts them. `settle` ends it."""
        return SpeculativeSteps(session, self._pace, stats, lambda: self._store.traffic.n_pages)

    def record(self, hear: Record | None) -> None:
        """Tell `hear` of every choice of experts from now on: layer and experts [n, k]. None ends it."""
        self._experts.record = hear

    # ---- text ----

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens are recognised, none is added."""
        return self.tokenizer.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(tokens)

    def render(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        think: bool | None = None,
    ) -> str:
        """The prompt that a conversation becomes."""
        return self.prompts.render(messages, tools_of(tools)[0], think)

    # ---- answers ----

    def stream(
        self,
        prompt: str | Messages,
        *,
        tokens: Sequence[int] | None = None,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        think: bool | None = None,
        think_budget: int | None = None,
        tools: Tools | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        logprobs: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        grammar: Grammar | str | None = None,
        session: Session | None = None,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Step]:
        """Answer a prompt (continued as it is) or messages (through the chat template), step by step.

        tools: functions (see tools) or their schemas; nothing is run here.
        tool_choice: "auto", "none" (it knows the tools and calls none), "required" (the answer is at least one call)
        or {"type": "function", "function": {"name": ...}} (a call of this one); parallel_tool_calls: whether an answer
        may make several calls.
        response_format, grammar: what the answer must look like (`localmimo.decode.grammar`); thinking stays free.
        tokens: the same prompt where the caller has it as tokens already; nothing is rendered or encoded then.
        Closing the iterator stops the generation; setting `cancel` from any thread does so within a layer.
        Raises BadRequest, ContextFull.
        """
        chat = not isinstance(prompt, str)
        schemas, _ = tools_of(tools)
        options = GenerationOptions(
            sampling=sampling or Sampling(),
            max_tokens=max_tokens,
            stop=stop,
            think=think,
            think_budget=think_budget,
            tools=schemas,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            logprobs=logprobs,
            response_format=response_format,
            grammar=grammar,
            cancel=cancel or threading.Event(),
            progress=progress,
        )
        asked = self._asked(prompt, schemas, think) if tokens is None else Prompt("", list(tokens))
        self._check_tokens(asked.tokens)
        answer = Answer()
        with self._borrow(session) as timeline:
            try:
                for step in self._generation(timeline, asked.tokens, options, chat=chat).run(asked.tokens):
                    answer.add(step)
                    yield step
            finally:
                if chat and tokens is None:
                    whole = answer.finish_reason in ("stop", "tool_calls") and not stop
                    self.prompts.remember(asked, answer.message().as_dict(), answer.tokens, whole=whole)

    @overload
    def generate(self, prompt: str, **options: Any) -> Completion: ...
    @overload
    def generate(self, prompt: list[str], **options: Any) -> list[Completion]: ...
    def generate(self, prompt: str | list[str], **options: Any) -> Completion | list[Completion]:
        """Continue a text, or each of a list of texts, `max_batch` of them at a time. Options as for `stream`.

        A text of a list becomes what it becomes alone; the stats of expert pages are those of all together.
        """
        if isinstance(prompt, list):
            return self._generate_together(prompt, GenerationOptions(**options))
        return _completion(self.stream(prompt, **options))

    def _generate_together(self, prompts: list[str], options: GenerationOptions) -> list[Completion]:
        tokens = [self._check_tokens(self._asked(prompt, None, None).tokens) for prompt in prompts]
        steps: list[list[Step]] = [[] for _ in prompts]
        with self._borrow(None):
            while len(self._timelines) < min(self.plan.max_batch, len(prompts)):
                self._timelines.append(self._new_session())
            batch = Batch(
                tokens,
                self._timelines,
                lambda n, timeline: self._generation(timeline, tokens[n], options, chat=False),
            )
            for number, step in batch.run():
                steps[number].append(step)
        return [_completion(said) for said in steps]

    def chat(self, messages: Messages, *, tools: Tools | None = None, **options: Any) -> Message:
        """The assistant's next turn; its `run_tools` runs those tools that are functions. Options as for `stream`."""
        if isinstance(messages, str):
            raise BadRequest(
                "chat takes a list of messages; give a text to generate, or [{'role': 'user', ...}]."
            )
        schemas, functions = tools_of(tools)
        return Answer.of(self.stream(messages, tools=schemas, **options)).message(functions)

    def agent(
        self,
        messages: Messages,
        tools: Tools,
        max_steps: int = 10,
        *,
        approve: Approve | None = None,
        tool_limit_s: float = LIMIT_S,
        max_result_chars: int = MAX_CHARS,
        **options: Any,
    ) -> Run:
        """Answer, run the calls, read their results, and so on, for at most max_steps answers; the whole history.

        tools: functions. approve: asked before each call; without it every call is run. Options as for `stream`.
        """
        schemas, functions = tools_of(tools)
        return run_agent(
            lambda history: self.chat(history, tools=schemas, **options),
            messages,
            functions,
            max_steps,
            approve=approve,
            limit_s=tool_limit_s,
            max_chars=max_result_chars,
        )

    @contextmanager
    def session(self) -> Iterator[Session]:
        """The engine's timeline, for you alone until the `with` block ends: sync, step, rewind."""
        with self._borrow(None) as timeline:
            yield timeline

    def logits(self, tokens: Sequence[int], *, chunk: int = PREFILL_CHUNK) -> Tensor:
        """Logits float32 [n, vocab] after each of n tokens, read from an empty context `chunk` tokens at a time.

        The result is the caller's memory, outside the RAM budget; `logit_rows` gives it piece by piece.
        """
        return torch.cat(list(self.logit_rows(tokens, chunk=chunk)))

    def logit_rows(self, tokens: Sequence[int], *, chunk: int = PREFILL_CHUNK) -> Iterator[Tensor]:
        """The same logits as they are computed: float32 [at most chunk, vocab] at a time."""
        tokens = self._check_tokens(list(tokens))
        with self._borrow(None) as timeline:
            yield from timeline.logits(tokens, chunk)

    # ---- inside ----

    def _asked(
        self, prompt: str | Messages, tools: Sequence[Mapping[str, Any]] | None, think: bool | None
    ) -> Prompt:
        if not isinstance(prompt, str):
            asked = self.prompts.build(prompt, tools, think)
        elif prompt.strip():
            asked = Prompt(prompt, self.encode(prompt))
        else:
            raise BadRequest("The prompt is empty: say something.")
        return asked

    def _opens_thinking(self, tokens: Sequence[int]) -> bool:
        return self.decode(tokens[-8:]).rstrip().endswith("<think>")

    def _check_tokens(self, tokens: list[int]) -> list[int]:
        if not tokens:
            raise BadRequest("The prompt is empty: give at least one token.")
        if not 0 <= min(tokens) <= max(tokens) < self.config.vocab_size:
            raise BadRequest(
                f"Token {max(tokens)} is outside the model's vocabulary of {self.config.vocab_size:,}."
            )
        if len(tokens) > self.context:
            raise ContextFull(
                f"The prompt has {len(tokens):,} tokens and the context {self.context:,}: "
                f"give a longer --context (this model: up to {self.config.max_context:,}) or a shorter prompt."
            )
        return tokens

    def _generation(
        self, timeline: Session, tokens: list[int], options: GenerationOptions, *, chat: bool
    ) -> Generation:
        thinking = chat and self._opens_thinking(tokens)
        return Generation(
            session=timeline,
            tokenizer=self.tokenizer,
            parser=StreamParser(options.callable, thinking) if chat else PlainTextParser(),
            sampling=self._constraints.sampling(options),
            rules=options.rules,
            traffic=lambda: self._store.traffic,
            cancel=options.cancel,
            progress=options.progress,
            pace=self._pace,
            constraint=self._constraints.follow(options, tokens, chat=chat, thinking=thinking),
        )

    @cached_property
    def _constraints(self) -> Constraints:
        return Constraints(self.tokenizer, self.config.vocab_size)

    def _crossovers(self) -> dict[str, int]:
        """From how many tokens on packed matrices are unpacked on the GPU; with float32 activations that is fixed."""
        if self._model.dtype != torch.bfloat16:
            return {}
        attention = (block.attention for block in self._model.weights.blocks)
        return settle(
            (q for one in attention for q in (one.qkv, one.o)), self._model.device, self.device.title
        )

    @contextmanager
    def _borrow(self, session: Session | None) -> Iterator[Session]:
        """The engine's own timeline, for one caller at a time: the plan counts one KV cache. Others wait.

        A plain lock, not a re-entrant one: a generator may be advanced from another thread than it was begun in.
        """
        if session is not None and session in self._timelines and self._holder is not None:
            yield session  # lent out by `session`, whose block is still open
            return
        if self._holder == threading.get_ident():
            raise BadRequest(
                "The engine is answering already in this thread: finish or close that answer first."
            )
        with self._lock:
            self._holder = threading.get_ident()
            if not self._timelines:
                self._timelines.append(self._new_session())
            try:
                yield self._timelines[0]
            finally:
                self._holder = None
                self._pager.publish()

    def _new_session(self) -> Session:
        return Session(
            self._model,
            self._experts,
            self.context,
            self._opening.kv_dtype,
            segment_tokens=self.plan.stretch_tokens,
            identity=self.identity,
            heads=self._heads,
            shrink=(self._graphs or self._experts).shrink,
            pool=self._store.gpu,
            graphs=self._graphs,
        )

    def close(self) -> None:
        """Stop reading, save the router statistics and give the memory back."""
        self._pager.close()
        self._timelines.clear()
        if "template" in self.__dict__:
            self.template.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _completion(steps: Iterable[Step]) -> Completion:
    answer = Answer.of(steps)
    return Completion(answer.content, answer.tokens, answer.finish_reason, answer.message().stats)
