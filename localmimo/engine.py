"""Engine: an opened pack, ready to answer. `load` opens it; generate, stream, chat, agent, session and logits use it.

The Python API. Must not know terminals or HTTP.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, SupportsIndex, overload

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
from localmimo.decode.draft_depth import Draft
from localmimo.decode.generation import Generation, PlainTextParser
from localmimo.decode.grammar import Grammar
from localmimo.decode.options import GenerationOptions, Sampling, check_keywords, sampling_of
from localmimo.decode.request import PromptLimits, remember
from localmimo.decode.session import Progress, Session
from localmimo.decode.sessions import Sessions
from localmimo.decode.speculative import SpeculativeSteps
from localmimo.decode.steps import DraftStats, FinishReason, Stats, Step
from localmimo.errors import BadRequest
from localmimo.experts.compute.cpu_runner import Record
from localmimo.experts.store.counters import PageCounters
from localmimo.limits import PREFILL_CHUNK
from localmimo.loading.options import Dtype, Kv, LoadOptions
from localmimo.loading.parts import EngineParts, open_parts
from localmimo.model.weights import OnProgress
from localmimo.tools.tool import LIMIT_S, MAX_CHARS, Tool, tools_of

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Callable[..., Any] | Tool | Mapping[str, Any]]
CLOSED = "The engine was closed: load the pack again."


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
    on_progress: OnProgress = lambda done, total: None,
) -> "Engine":
    """Open a pack; None and "mimo-mini" open the embedded model.

    context: positions of a sequence (default: 32,768 or the model's own limit). ram: bytes or "96GiB", for
    everything but the interpreter and its libraries (default: what is free, less a reserve). device: "cpu", "cuda"
    or "cuda:1"; "auto" is a GPU that can be used and is large enough, else the CPU. vram: of it, for dense weights,
    KV and the hottest experts (default: what is free). dtype: of the activations ("auto": bfloat16 on a GPU). kv:
    of the KV cache, "bf16" unless dtype is "float32"; "int8" takes half of bf16, with a little loss. window_keys:
    keys that a window layer sees, with the token itself (default: the config's). profile: name of the router
    statistics to start from and to add to when the engine closes; None keeps none. prefetch: read ahead of the
    router while that pays. trust: skip the pages' checksums. draft: tokens that the model's draft heads propose at
    a time, 0 to 3; "auto" measures what pays; 0 does not load them. max_batch: sequences that `generate` advances
    together, each with memory for the whole context. on_progress: called with the bytes of dense tensors read so
    far, and in all. Raises BadPack, BadModel, BadRequest, NoDevice, or DoesNotFit with the numbers.
    """
    options = LoadOptions(
        context=context, ram=ram, vram=vram, device=device, dtype=dtype, kv=kv, window_keys=window_keys,
        profile=profile, prefetch=prefetch, trust=trust, draft=draft, max_batch=max_batch,
    )  # fmt: skip
    return Engine(open_parts(path, options, on_progress))


class Engine:
    """One opened pack. Thread-safe: one generation at a time, the others wait."""

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self.pack = parts.pack
        self.config = parts.config
        self.device = parts.device
        self.plan = parts.plan
        self._model = parts.model
        self._experts = parts.experts
        self._graphs = parts.graphs
        self._store = parts.expert_cache.store
        self._sessions = Sessions(parts.new_session, released=parts.expert_cache.publish)
        self._depth_policy = parts.new_depth_policy()
        self.limits = PromptLimits(parts.config.vocab_size, parts.plan.context, parts.config.max_context)

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

    @cached_property
    def _constraints(self) -> Constraints:
        return Constraints(self.tokenizer, self.config.vocab_size)

    @property
    def context(self) -> int:
        """Positions of a session."""
        return self.plan.context

    @property
    def n_slots(self) -> int:
        """Expert slots in use now: fewer than planned while the system is short of memory."""
        return self._store.n_slots

    @property
    def counters(self) -> PageCounters:
        """What was asked of the expert store since the engine was opened."""
        return self._store.counters.copy()

    def effective(self) -> dict[str, Any]:
        """The configuration in force, for people and for JSON."""
        return self._parts.effective()

    def __repr__(self) -> str:
        state = "closed" if self._sessions.is_closed else f"{self.n_slots:,} expert slots"
        return (
            f"<Engine {self.pack.name} from {self.pack.path} on {self.device}: "
            f"context {self.context:,}, {state}>"
        )

    # ---- measuring ----

    def speculative_steps(self, session: Session, stats: DraftStats) -> SpeculativeSteps:
        """Steps a session with this engine's drafts, as `stream` does, and counts them. `settle` ends it."""
        return SpeculativeSteps(session, self._depth_policy, stats, lambda: self._store.counters.n_pages)

    def record(self, observer: Record | None) -> None:
        """Call `observer` with every choice of experts from now on: layer and experts [n, k]. None ends it."""
        self._experts.record = observer

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
        sampling: Sampling | Mapping[str, Any] | None = None,
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
        self._sessions.demand_open()
        schemas, _ = tools_of(tools)
        options = GenerationOptions(
            sampling=sampling_of(sampling),
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
        asked = self._prompt(prompt, schemas, think) if tokens is None else Prompt("", list(tokens))
        yield from self.answer(asked, options, chat=not isinstance(prompt, str), session=session)

    def answer(
        self, prompt: Prompt, options: GenerationOptions, *, chat: bool, session: Session | None = None
    ) -> Iterator[Step]:
        """`stream` for a prompt that is tokens already; the answer is remembered by its messages or its text."""
        self._sessions.demand_open()
        self.limits.check(prompt.tokens)
        answer, remembered = Answer(), False
        with self._sessions.use_one(session) as current:
            try:
                for step in self._generation(current, prompt.tokens, options, chat=chat).run(prompt.tokens):
                    answer.add(step)
                    if (
                        step.finish_reason is not None
                    ):  # before it is shown: the next prompt may follow at once
                        remembered = True
                        self._remember(prompt, answer, options)
                    yield step
            finally:
                if not remembered:
                    self._remember(prompt, answer, options)

    @overload
    def generate(self, prompt: str, **options: Any) -> Completion: ...
    @overload
    def generate(self, prompt: list[str], **options: Any) -> list[Completion]: ...
    def generate(self, prompt: str | list[str], **options: Any) -> Completion | list[Completion]:
        """Continue a text, or each of a list of texts, `max_batch` of them at a time. Options as for `stream`.

        A text of a list becomes what it becomes alone; the stats of expert pages are those of all together.
        """
        check_keywords(options, "generate")
        if isinstance(prompt, list):
            options["sampling"] = sampling_of(options.get("sampling"))
            return self._generate_together(prompt, GenerationOptions(**options))
        return _completion(self.stream(prompt, **options))

    def _generate_together(self, prompts: list[str], options: GenerationOptions) -> list[Completion]:
        self._sessions.demand_open()
        tokens = [self._prompt(prompt, None, None).tokens for prompt in prompts]
        for one_prompt in tokens:
            self.limits.check(one_prompt)
        steps: list[list[Step]] = [[] for _ in prompts]
        with self._sessions.use(min(self.plan.max_batch, len(prompts))) as sessions:
            batch = Batch(
                tokens,
                sessions,
                lambda n, session: self._generation(session, tokens[n], options, chat=False),
            )
            for number, step in batch.run():
                steps[number].append(step)
        return [_completion(given) for given in steps]

    def chat(self, messages: Messages, *, tools: Tools | None = None, **options: Any) -> Message:
        """The assistant's next turn; its `run_tools` runs those tools that are functions. Options as for `stream`."""
        if isinstance(messages, str):
            raise BadRequest(
                "chat takes a list of messages; give a text to generate, or [{'role': 'user', ...}]."
            )
        check_keywords(options, "chat")
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
        check_keywords(options, "agent")
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
        """The engine's session, for you alone until the `with` block ends: sync, step, rewind."""
        with self._sessions.use_one(None) as session:
            yield session

    def logits(self, tokens: Sequence[int], *, chunk: int = PREFILL_CHUNK) -> Tensor:
        """Logits float32 [n, vocab] after each of n tokens, read from an empty context `chunk` tokens at a time.

        The result is the caller's memory, outside the RAM budget; `logit_rows` gives it piece by piece.
        """
        return torch.cat(list(self.logit_rows(tokens, chunk=chunk)))

    def logit_rows(self, tokens: Sequence[int], *, chunk: int = PREFILL_CHUNK) -> Iterator[Tensor]:
        """The same logits as they are computed: float32 [at most chunk, vocab] at a time."""
        tokens = list(tokens)
        self.limits.check(tokens)
        with self._sessions.use_one(None) as session:
            yield from session.logits(tokens, chunk)

    # ---- inside ----

    def _prompt(
        self, prompt: str | Messages, tools: Sequence[Mapping[str, Any]] | None, think: bool | None
    ) -> Prompt:
        if not isinstance(prompt, str):
            return self.prompts.build(prompt, tools, think)
        if not prompt.strip():
            raise BadRequest("The prompt is empty: say something.")
        return Prompt("", self.encode(prompt))

    def _generation(
        self, session: Session, tokens: list[int], options: GenerationOptions, *, chat: bool
    ) -> Generation:
        thinking = chat and self.decode(tokens[-8:]).rstrip().endswith("<think>")
        return Generation(
            session=session,
            tokenizer=self.tokenizer,
            parser=StreamParser(options.callable, thinking) if chat else PlainTextParser(),
            sampling=self._constraints.sampling(options),
            rules=options.rules,
            counters=lambda: self._store.counters,
            cancel=options.cancel,
            progress=options.progress,
            depth_policy=self._depth_policy,
            constraint=self._constraints.follow(options, tokens, chat=chat, thinking=thinking),
        )

    def _remember(self, prompt: Prompt, answer: Answer, options: GenerationOptions) -> None:
        remember(prompt, answer, options.stop, self.prompts, self.tokenizer)

    # ---- its end ----

    def close(self) -> None:
        """Stop reading, save the router statistics and give the memory back; an answer in another thread is stopped."""
        if self._sessions.is_closed:
            return
        self._sessions.close(CLOSED)
        self._parts.close()
        if "template" in self.__dict__:
            self.template.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "An engine cannot be copied or pickled: it holds files, threads and memory. Load the pack again instead."
        )


def _completion(steps: Iterable[Step]) -> Completion:
    answer = Answer.of(steps)
    return Completion(answer.content, answer.tokens, answer.finish_reason, answer.message().stats)
