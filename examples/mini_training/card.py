"""Model card: measures an exported checkpoint and writes its figures.

Everything is measured on the exported (FP8, dequantised) weights. Knows the training folder and the
checkpoint; it must not change either.
"""

import json
import math
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mini_corpus import build
from tokenizers import Tokenizer
from torch import Tensor

from .batches import ID_BITS
from .export import load_exported, sha256
from .network import Network, Params, Shape, make_frame
from .sampling import chat_prompt

MAX_HELD_TOKENS = 8_192  # per kind
ROW = 512


@dataclass
class Measured:
    """One kind of held-out text: tokens, loss sums, and picks per layer and expert."""

    n_all: int = 0
    n_said: int = 0
    loss_all: float = 0.0
    loss_said: float = 0.0
    picks: list[Tensor] = field(default_factory=list)

    @property
    def perplexity(self) -> tuple[float, float]:
        """Over all tokens, and over what the assistant says."""
        return math.exp(self.loss_all / max(1, self.n_all)), math.exp(self.loss_said / max(1, self.n_said))

    @property
    def top_quarter(self) -> float:
        """Share of the picks that the busiest quarter of the experts takes, mean over layers."""
        parts = [
            p.sort(descending=True).values[: len(p) // 4].sum() / p.sum()
            for p in (q.float() for q in self.picks)
        ]
        return float(torch.stack(parts).mean())


def held_rows(folder: Path, kind: str) -> tuple[Tensor, Tensor]:
    """Held-out conversations packed into rows: raw tokens [B, 512] and document numbers."""
    raw, starts = np.load(folder / f"{kind}.held.npy"), np.load(folder / f"{kind}.held.starts.npy")
    rows, documents, row, numbers = [], [], [], []
    for n in range(len(starts) - 1):
        talk = raw[starts[n] : starts[n + 1]][:ROW].tolist()
        if len(row) + len(talk) > ROW:
            rows.append(row + [0] * (ROW - len(row)))
            documents.append(numbers + [-1] * (ROW - len(numbers)))
            row, numbers = [], []
        if len(rows) * ROW >= MAX_HELD_TOKENS:
            break
        row, numbers = row + talk, numbers + [n] * len(talk)
    if row and len(rows) * ROW < MAX_HELD_TOKENS:
        rows.append(row + [0] * (ROW - len(row)))
        documents.append(numbers + [-1] * (ROW - len(numbers)))
    return torch.tensor(rows), torch.tensor(documents)


@torch.no_grad()
def measure_kind(
    net: Network, p: Params, biases: dict[str, Tensor], folder: Path, kind: str, silent: tuple[int, int]
) -> Measured:
    """Perplexity and routing on one kind's held-out text."""
    raw, documents = held_rows(folder, kind)
    out = Measured()
    for row, document in zip(raw.split(4), documents.split(4), strict=True):
        tokens = row & ID_BITS
        hidden, picks = net.hidden(p, biases, tokens, make_frame(net.shape, document))
        losses = torch.nn.functional.cross_entropy(
            net.logits(p, hidden[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
        )
        real = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
        real &= ~((tokens[:, 1:] == silent[1]) & (tokens[:, :-1] == silent[0]))
        said = real & ((row[:, 1:] & 0x8000) > 0)
        for name, mask in (("all", real), ("said", said)):
            setattr(out, f"n_{name}", getattr(out, f"n_{name}") + int(mask.sum()))
            setattr(
                out,
                f"loss_{name}",
                getattr(out, f"loss_{name}") + float(losses[mask.flatten()].double().sum()),
            )
        counts = list(picks.values())
        out.picks = [a + b for a, b in zip(out.picks, counts, strict=True)] if out.picks else counts
    return out


@torch.no_grad()
def states(net: Network, p: Params, biases: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """Hidden states [1, T', H] of all tokens, T' rounded up to blocks of 128."""
    padded = torch.tensor([tokens + [0] * (-len(tokens) % 128)])
    return net.hidden(p, biases, padded, make_frame(net.shape, torch.zeros_like(padded)))[0]


@torch.no_grad()
def greedy(
    net: Network, p: Params, biases: dict[str, Tensor], prompt: list[int], end: int, limit: int = 220
) -> list[int]:
    """The prompt with its greedy continuation and the final <|im_end|>."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + limit:
        hidden = states(net, p, biases, tokens)
        tokens.append(int(net.logits(p, hidden[0, len(tokens) - 1]).argmax()))
        if tokens[-1] == end:
            break
    return tokens


@torch.no_grad()
def draft_agreement(
    net: Network, p: Params, tokens: list[int], hidden: Tensor, begin: int
) -> list[list[bool]]:
    """For each head and step of the answer: whether it would have drafted what greedy decoding chose."""
    n = len(tokens) - 1  # the last token has no hidden state of its own
    length = hidden.shape[1]
    frame = make_frame(net.shape, torch.zeros(1, length, dtype=torch.int64))
    out: list[list[bool]] = []
    for k in range(net.shape.n_mtp):
        following = torch.tensor([(tokens[k + 1 :] + [0] * length)[:length]])
        drafted = net.draft(p, k, hidden, following, frame)
        best = (drafted[0].to(p["head"].dtype) @ p["head"].T).argmax(-1).tolist()
        out.append([best[i] == tokens[i + 2 + k] for i in range(begin - 1, n - 1 - k)])
    return out


def acceptance(agreements: list[list[list[bool]]]) -> tuple[list[float], float]:
    """Agreement per head, and the mean number of drafts accepted in a row (of three)."""
    heads = len(agreements[0])
    rates = [
        sum(sum(a[k]) for a in agreements) / max(1, sum(len(a[k]) for a in agreements)) for k in range(heads)
    ]
    runs = [
        next((k for k in range(heads) if not a[k][i]), heads) for a in agreements for i in range(len(a[-1]))
    ]
    return rates, sum(runs) / max(1, len(runs))


def processor() -> str:
    """The processor's kind and the number of cores, for the conditions."""
    import os

    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    special = [f for f in ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx2") if f in flags]
    return f"{os.cpu_count()} {platform.machine()} cores with {', '.join(special)}"


def loss_curve(run: Path, points: int = 14) -> list[tuple[str, int, float]]:
    """(phase, tokens, loss) at even distances of the log, each the mean of the steps around it."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    out = []
    for phase in ("trunk", "drafts"):
        part = [line for line in lines if line["phase"] == phase]
        for at in (
            np.linspace(0, len(part) - 1, points if phase == "trunk" else 4).astype(int) if part else []
        ):
            near = part[max(0, at - 4) : at + 5]
            out.append((phase, part[at]["tokens"], sum(n["loss"] for n in near) / len(near)))
    return out


def measure_trunk(
    run: Path, net: Network, p: Params, biases: dict[str, Tensor], checkpoint: Path
) -> dict[str, Any]:
    """Perplexities, routing and answers; kept in `run` for the same main tensors, as they take minutes."""
    key = [sha256(f) for f in sorted(checkpoint.glob("model-*.safetensors"))]
    kept = run / "card-trunk.json"
    found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if found.get("key") == key:
        return found  # type: ignore[no-any-return]
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    answers, end = [], tokenizer.token_to_id("<|im_end|>")
    for prompt in Path(build.__file__).with_name("card_prompts.txt").read_text(encoding="utf-8").splitlines():
        ids = tokenizer.encode(chat_prompt(prompt), add_special_tokens=False).ids
        tokens = greedy(net, p, biases, ids, end)
        reply = tokenizer.decode(tokens[len(ids) :], skip_special_tokens=False).removesuffix("<|im_end|>")
        answers.append({"prompt": prompt, "reply": reply, "tokens": tokens, "begin": len(ids)})
        print(f"> {prompt}\n  {reply}", flush=True)
    silent = (tokenizer.token_to_id("<think>"), tokenizer.token_to_id("</think>"))
    kinds = {k: measure_kind(net, p, biases, run / "data", k, silent) for k in build.SHARES}
    overall = [sum(layers) for layers in zip(*(m.picks for m in kinds.values()), strict=True)]
    out = {
        "key": key,
        "perplexity": {k: m.perplexity for k, m in kinds.items()},
        "held_tokens": {k: m.n_all for k, m in kinds.items()},
        "top_quarter": {k: m.top_quarter for k, m in kinds.items()}
        | {"all together": Measured(picks=overall).top_quarter},
        "answers": answers,
    }
    kept.write_text(json.dumps(out) + "\n", encoding="utf-8")
    return out


def measure(run: Path, checkpoint: Path) -> dict[str, Any]:
    """All figures of the card as one JSON-able object."""
    net = Network(Shape())
    p, biases = load_exported(net.shape, checkpoint)
    trunk = measure_trunk(run, net, p, biases, checkpoint)
    agreements = [
        draft_agreement(net, p, a["tokens"], states(net, p, biases, a["tokens"]), a["begin"])
        for a in trunk["answers"]
    ]
    rates, run_length = acceptance(agreements)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    last, trunk_last = lines[-1], [line for line in lines if line["phase"] == "trunk"][-1]
    return trunk | {
        "agreement": rates,
        "accepted_of_three": run_length,
        "curve": loss_curve(run),
        "tokens": trunk_last["tokens"],
        "steps": trunk_last["step"],
        "draft_tokens": last["tokens"] - trunk_last["tokens"],
        "note": (run / "notes.txt").read_text(encoding="utf-8") if (run / "notes.txt").exists() else "",
        "hours": last["elapsed_s"] / 3600,
        "machine": processor(),
        "sha256": {f.name: (f.stat().st_size, sha256(f)) for f in sorted(checkpoint.iterdir())},
    }


def write(run: Path, checkpoint: Path, out: Path) -> None:
    """Measure and write the card and, beside the training log, the figures as JSON."""
    figures = measure(run, checkpoint)
    (run / "card.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    out.write_text(text(figures), encoding="utf-8")


def _table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows])


def text(f: dict[str, Any]) -> str:
    """The card in Markdown."""
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    kinds = [
        (k, f"{a:.2f}", f"{s:.2f}", f["held_tokens"][k], f"{100 * f['top_quarter'][k]:.0f} %")
        for k, (a, s) in f["perplexity"].items()
    ]
    kinds.append(
        (
            "all together",
            "",
            "",
            sum(f["held_tokens"].values()),
            f"{100 * f['top_quarter']['all together']:.0f} %",
        )
    )
    heads = [(f"head {k}", f"{100 * rate:.0f} %") for k, rate in enumerate(f["agreement"])]
    answers = "\n\n".join(
        f"**{n}. {a['prompt']}**\n\n{_quote(a['reply'])}" for n, a in enumerate(f["answers"], 1)
    )
    return template.format(
        tokens=f"{f['tokens'] / 1e6:.1f}",
        steps=f["steps"],
        note=f["note"].strip(),
        draft_tokens=f"{f['draft_tokens'] / 1e6:.1f}",
        hours=f"{f['hours']:.1f}",
        machine=f["machine"],
        kinds=_table(
            (
                "kind",
                "perplexity, all tokens",
                "perplexity, assistant's tokens",
                "held-out tokens",
                "picks taken by the busiest quarter of experts",
            ),
            kinds,
        ),
        heads=_table(("draft head", "agrees with greedy decoding"), heads),
        accepted=f"{f['accepted_of_three']:.2f}",
        curve=_table(("phase", "tokens seen", "loss"), [(p, f"{t:,}", f"{v:.3f}") for p, t, v in f["curve"]]),
        answers=answers,
        files=_table(("file", "bytes", "sha256"), [(n, s, f"`{h}`") for n, (s, h) in f["sha256"].items()]),
        shares=_table(
            ("kind", "early", "late"),
            [(k, f"{100 * a:.0f} %", f"{100 * b:.0f} %") for k, (a, b) in build.SHARES.items()],
        ),
    )


def _quote(answer: str) -> str:
    return "\n".join(f"> {line}  " for line in (answer.strip() or "(an empty answer)").split("\n"))
