"""The command lines of `chat` and `serve`: a model at this terminal, or over HTTP.

Flags and help only; imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from localmimo.cli.options import (
    Context,
    Device,
    Draft,
    Dtype,
    Json,
    Kv,
    Model,
    NoPrefetch,
    Profile,
    Quiet,
    Ram,
    Trust,
    Verbose,
    Vram,
    carry_out,
    ui_of,
)


def chat(
    first: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A pack's folder, or mimo-mini.", show_default=False)
    ] = None,
    second: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="Answer this and exit; - reads it from stdin.", show_default=False
        ),
    ] = None,
    context: Context = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("-n", "--max-tokens", metavar="N", min=1, help="Tokens of an answer, at most."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature", "--temp", metavar="X", min=0, help="0 takes the likeliest token.  [default: 0.7]"
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p", metavar="X", min=0, max=1, help="Share of probability kept.  [default: 0.95]"
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", metavar="N", min=0, help="Tokens kept; 0 keeps all.  [default: 0]"),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            "--min-p",
            metavar="X",
            min=0,
            max=1,
            help="Least share of the likeliest token's probability.  [default: 0]",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Makes an answer repeatable.")] = None,
    system: Annotated[
        str | None, typer.Option("-s", "--system", metavar="TEXT|@FILE", help="System prompt.")
    ] = None,
    think: Annotated[
        bool | None,
        typer.Option("--think/--no-think", help="Think first.  [default: as the model's template says]"),
    ] = None,
    think_budget: Annotated[
        int | None, typer.Option("--think-budget", metavar="N", min=0, help="Tokens of thinking, at most.")
    ] = None,
    hide_thinking: Annotated[bool, typer.Option("--hide-thinking", help="Do not show thinking.")] = False,
    stats: Annotated[
        bool | None,
        typer.Option("--stats/--no-stats", help="Figures after an answer.  [default: in a terminal]"),
    ] = None,
    ram: Ram = None,
    vram: Vram = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kv: Kv = "auto",
    profile: Profile = "default",
    no_prefetch: NoPrefetch = False,
    trust: Trust = False,
    draft: Draft = "auto",
    schema: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="The answer is JSON that satisfies this schema."),
    ] = None,
    grammar: Annotated[
        str | None,
        typer.Option(metavar="TEXT|@FILE", help="The answer follows this grammar (Lark or GBNF)."),
    ] = None,
    tools: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE.py", help="Functions that the model may ask for; you are asked before each call."
        ),
    ] = None,
    stats_json: Annotated[
        str | None,
        typer.Option(
            "--stats-json",
            metavar="FILE",
            help="Append a JSON line per token: pages by tier, bytes, time.",
        ),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="No Markdown, no redrawing.")] = False,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Talk with a model: localmimo chat [MODEL] [PROMPT].

    Without a PROMPT it opens a conversation (/help lists its commands). With one, or with text piped in, it
    prints the answer on stdout and exits. A single word or text that is neither a folder nor "mimo-mini" is
    taken as the PROMPT for the small model that comes along.
    """
    from localmimo.cli.commands.chat import ChatOptions, run_chat
    from localmimo.cli.open_engine import LoadFlags

    opening = LoadFlags(
        context=context, ram=ram, vram=vram, device=device, dtype=dtype, kv=kv,
        profile=profile, prefetch=not no_prefetch, trust=trust, draft=draft,
    )  # fmt: skip
    options = ChatOptions(
        arguments=tuple(text for text in (first, second) if text is not None),
        opening=opening,
        schema=schema,
        grammar=grammar,
        system=system,
        think=think,
        think_budget=think_budget,
        max_tokens=max_tokens,
        sampling={"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed},
        hide_thinking=hide_thinking,
        stats=stats,
        plain=plain,
        as_json=as_json,
        tools=tuple(tools or ()),
        stats_json=stats_json,
    )
    return carry_out(lambda: run_chat(options, ui_of(verbose, quiet)))


def serve(
    model: Model = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; beyond this machine only with a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0 takes a free one.")] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", metavar="KEY", help="What clients must send.  [default: LOCALMIMO_API_KEY]"
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option("--cors", metavar="ORIGIN", help="A web page's origin that may call; repeat for more."),
    ] = None,
    queue: Annotated[
        int, typer.Option("--queue", metavar="N", min=0, help="Requests that may wait; more get a 429.")
    ] = 8,
    sessions_dir: Annotated[
        Path | None,
        typer.Option(
            "--sessions-dir",
            metavar="DIR",
            help="Keep conversations that others push out, to take them up again.",
        ),
    ] = None,
    sessions_disk: Annotated[
        str, typer.Option("--sessions-disk", metavar="SIZE", help="Disk for them; the oldest give way.")
    ] = "50GiB",
    context: Context = None,
    ram: Ram = None,
    vram: Vram = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kv: Kv = "auto",
    profile: Profile = "default",
    no_prefetch: NoPrefetch = False,
    trust: Trust = False,
    draft: Draft = "auto",
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Serve a model over HTTP: OpenAI's and Anthropic's APIs, and a page to talk with it.

    Requests are answered one at a time, first come, first served. SIGTERM or Ctrl-C finishes what came in.
    """
    from localmimo.cli.commands.serve import ServeOptions, model_name, run_serve
    from localmimo.cli.open_engine import LoadFlags

    opening = LoadFlags(
        context=context, ram=ram, vram=vram, device=device, dtype=dtype, kv=kv,
        profile=profile, prefetch=not no_prefetch, trust=trust, draft=draft,
    )  # fmt: skip
    job = ServeOptions(
        model_name(model),
        host=host,
        port=port,
        api_key=api_key,
        cors=tuple(cors or ()),
        queue=queue,
        sessions_dir=sessions_dir and sessions_dir.expanduser(),
        sessions_disk=sessions_disk,
        opening=opening,
    )
    return carry_out(lambda: run_serve(job, ui_of(verbose, quiet)))
