"""Training of the embedded model mimo-mini: from scratch, or from where a folder stopped, up to its export.

    python examples/train_mini.py --out DIR --minutes 90

Fetches the openly licensed sources with pip (exact versions), builds the mix of texts and the tokenizer, then
trains with one process per core. The processes share weights and gradients through memory. The learning rate is
constant for 75 % of the time and then falls to zero. The draft (MTP) blocks are trained in the last minutes, while
the other weights stay fixed.
"""

# ruff: noqa: E402 (the imports follow the settings that they need)

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch
import torch.multiprocessing as mp
from mini_corpus import build
from mini_training.batches import Batch, Mixer
from mini_training.muon import Optimizer, shares
from mini_training.network import (
    Network,
    Params,
    Shape,
    WeightedLoss,
    init_biases,
    init_params,
    make_frame,
    stays_float,
)
from mini_training.sampling import sample_answers
from torch import Tensor

from localmimo.model.transformer import rms_norm

COOL_FROM = 0.75  # share of the trunk's time after which the learning rate falls
LATE_FROM = 0.60  # share of the time from which the mix moves to its late shares
BALANCE = 1e-3  # step of the router's correction bias


@dataclass(frozen=True, slots=True)
class Run:
    """Settings of one run."""

    out: Path
    minutes: float
    draft_minutes: float = 10.0
    processes: int = 2
    rows: int = 8
    length: int = 512
    save_every_s: float = 300.0
    compiled: bool = True
    seed: int = 0
    max_steps: int = 0
    joint: bool = False  # in the drafts' time the trunk goes on too, at a small rate (a late touch-up)


class Shared:
    """Weights and gradients in memory that all processes see.

    `master` float32; `half` is what the forward pass uses; `grads[r]` belongs to process r.
    """

    def __init__(self, params: Params, biases: dict[str, Tensor], processes: int) -> None:
        self.master = {n: p.clone().share_memory_() for n, p in params.items()}
        self.half = {n: self._working(n, p).share_memory_() for n, p in params.items()}
        self.grads = [
            {n: torch.zeros_like(h).share_memory_() for n, h in self.half.items()} for _ in range(processes)
        ]
        self.biases = {n: b.clone().share_memory_() for n, b in biases.items()}
        self.picks = [
            {n: torch.zeros_like(b, dtype=torch.int64).share_memory_() for n, b in biases.items()}
            for _ in range(processes)
        ]
        self.loss = torch.zeros(processes).share_memory_()
        self.control = torch.zeros(2, dtype=torch.float64).share_memory_()  # progress, stop flag

    @staticmethod
    def _working(name: str, p: Tensor) -> Tensor:
        return p.clone() if stays_float(name) else p.to(torch.bfloat16)

    def publish(self, names: list[str]) -> None:
        """Copy masters to the working weights."""
        for name in names:
            self.half[name].copy_(self.master[name])


def schedule(progress: float, step: int) -> float:
    """Learning-rate factor: a short rise, flat, then a line to zero."""
    rise = min(1.0, (step + 1) / 60)
    return rise * max(0.01, min(1.0, (1 - progress) / (1 - COOL_FROM)))


def trunk_loss(
    net: Network, p: Params, biases: dict[str, Tensor], batch: Batch, length: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Next-token loss of one batch and the routers' picks."""
    frame = make_frame(net.shape, batch.documents[:, :length])
    hidden, picks = net.hidden(p, biases, batch.tokens[:, :length], frame)
    rows, weights = drawn(batch.weights[:, 1 : length + 1].flatten())
    x = rms_norm(hidden.flatten(0, 1)[rows], p["norm"], net.shape.eps).to(p["head"].dtype)
    return WeightedLoss.apply(x, p["head"], batch.tokens[:, 1 : length + 1].flatten()[rows], weights), picks


def drawn(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Which positions count: each with the probability that is its weight, so that the head skips the others.

    Their number is padded to a multiple of 256 with rows of weight zero: few shapes for the matrix library.
    """
    kept = torch.nonzero(torch.rand(len(weights)) < weights).flatten()
    rows = torch.nn.functional.pad(kept, (0, -len(kept) % 256))
    return rows, torch.nn.functional.pad(torch.ones(len(kept)), (0, len(rows) - len(kept)))


def draft_loss(
    net: Network,
    p: Params,
    biases: dict[str, Tensor],
    batch: Batch,
    length: int,
    heads: tuple[int, ...],
) -> Tensor:
    """Loss of draft blocks over a resting trunk: block k sees token i + 1 + k and predicts i + 2 + k."""
    frame = make_frame(net.shape, batch.documents[:, :length])
    with torch.no_grad():
        hidden, _ = net.hidden(p, biases, batch.tokens[:, :length], frame)
    return heads_loss(net, p, batch, hidden, heads)


def heads_loss(net: Network, p: Params, batch: Batch, hidden: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Sum of the draft blocks' losses over given hidden states [B, T, H]; embedding and head stay as they are."""
    p = p | {"embed": p["embed"].detach()}
    length = hidden.shape[1]
    frame = make_frame(net.shape, batch.documents[:, :length])
    total = torch.zeros(())
    for k in heads:
        x = net.draft(p, k, hidden, batch.tokens[:, k + 1 : length + k + 1], frame)
        n = min(length, batch.tokens.shape[1] - k - 2)
        ahead = slice(k + 2, k + 2 + n)
        same = batch.documents[:, :n] == batch.documents[:, ahead]
        rows, weights = drawn((batch.weights[:, ahead] * same).flatten())
        inputs = x[:, :n].flatten(0, 1)[rows].to(p["head"].dtype)
        targets = batch.tokens[:, ahead].flatten()[rows]
        total = total + WeightedLoss.apply(inputs, p["head"].detach(), targets, weights)
    return total


def joint_loss(
    net: Network, p: Params, biases: dict[str, Tensor], batch: Batch, length: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Trunk and draft blocks together; the drafts do not move the trunk's states."""
    frame = make_frame(net.shape, batch.documents[:, :length])
    hidden, picks = net.hidden(p, biases, batch.tokens[:, :length], frame)
    rows, weights = drawn(batch.weights[:, 1 : length + 1].flatten())
    x = rms_norm(hidden.flatten(0, 1)[rows], p["norm"], net.shape.eps).to(p["head"].dtype)
    trunk = WeightedLoss.apply(x, p["head"], batch.tokens[:, 1 : length + 1].flatten()[rows], weights)
    return trunk + heads_loss(net, p, batch, hidden.detach(), (0, 1, 2)), picks


def worker(rank: int, run: Run, shared: Shared, barrier, state: dict) -> None:  # type: ignore[no-untyped-def, type-arg]
    """One process: its share of every batch and its share of the optimizer."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed + rank)
    shape = Shape()
    net = Network(shape, run.compiled)
    silent = state["silent"]
    mixer = Mixer(run.out / "data", build.SHARES, silent, run.seed * 10 + rank + 1 + 1000 * state["restarts"])
    own_names = shares(shared.master, run.processes)[rank]
    optimizer = Optimizer(shared.master, own_names)
    if state["optimizers"]:
        optimizer.load(state["optimizers"][rank])
        mixer.resume(state["positions"][rank])
    leaves = {n: h.detach().requires_grad_() for n, h in shared.half.items()}
    for name, leaf in leaves.items():
        leaf.grad = shared.grads[rank][name]
    clock = Clock(run, state) if rank == 0 else None
    step, phase = state["step"], "trunk"
    while True:
        if clock is not None:
            clock.tick(shared, step)
        barrier.wait()
        progress, stop = shared.control.tolist()
        if stop:
            break
        new_phase = "trunk" if progress < 1 else "drafts"
        if new_phase != phase:
            phase = new_phase
            if rank == 0:
                shared.publish(list(shared.master))
            barrier.wait()
        for grad in shared.grads[rank].values():
            grad.zero_()
        late = max(0.0, min(1.0, (progress - LATE_FROM) / 0.15))
        batch = mixer.draw(run.rows, run.length, late)
        if phase == "trunk":
            loss, picks = trunk_loss(net, leaves, shared.biases, batch, run.length)
            for name, count in picks.items():
                shared.picks[rank][name].copy_(count)
        elif run.joint:
            loss, picks = joint_loss(net, leaves, shared.biases, batch, run.length)
            loss = loss / 2
        else:
            heads = (0,) if progress < 1.5 else (0, 1, 2)
            loss = draft_loss(net, leaves, shared.biases, batch, run.length, heads) / len(heads)
        loss.backward()
        shared.loss[rank] = loss.detach()
        barrier.wait()
        update(run, shared, optimizer, own_names, rank, phase, progress, step)
        step += 1
        if clock is not None:
            clock.note(shared, step, phase)
        barrier.wait()
        if clock is not None and clock.save_due():
            clock.ask_save()
        save_if_asked(run, shared, optimizer, mixer, rank, step, barrier, clock, silent)


def update(
    run: Run,
    shared: Shared,
    optimizer: Optimizer,
    own_names: list[str],
    rank: int,
    phase: str,
    progress: float,
    step: int,
) -> None:
    """Average the gradients of this process's names and step; process 0 also nudges the routers' balance."""
    if phase == "trunk":
        names = [n for n in own_names if not n.startswith("mtp.")]
        scale = schedule(progress, step)
    elif run.joint:
        names, scale = own_names, 0.3 * max(0.03, min(1.0, (2 - progress) / 0.4))
    else:
        wanted = ("mtp.0.",) if progress < 1.5 else ("mtp.",)
        names = [n for n in own_names if n.startswith(wanted)]
        scale = 0.5 if progress < 1.5 else 0.3 * max(0.03, (2 - progress) / 0.5)
    grads = {n: averaged([g[n] for g in shared.grads]) for n in names}
    optimizer.names = names
    optimizer.step(grads, scale)
    optimizer.names = own_names
    for name in names:
        shared.half[name].copy_(shared.master[name])
    if rank == 0 and phase == "trunk":
        for name, bias in shared.biases.items():
            load = sum(p[name].float() for p in shared.picks)
            bias.add_(BALANCE * min(1.0, 10 * schedule(progress, 10**6)) * torch.sign(load.mean() - load))


def averaged(grads: list[Tensor]) -> Tensor:
    """Mean of the processes' gradients in float32."""
    out = grads[0].float() if grads[0].dtype != torch.float32 else grads[0].clone()
    for grad in grads[1:]:
        out.add_(grad)
    return out.mul_(1 / len(grads))


class Clock:
    """Process 0's sense of time: progress, the log, the moments to save."""

    def __init__(self, run: Run, state: dict) -> None:  # type: ignore[type-arg]
        self.run, self.began = run, time.time() - state["elapsed"]
        self.tokens = state["tokens"]
        self.saved, self.last, self.copied = time.time(), time.time(), False
        self.want = False

    @property
    def elapsed(self) -> float:
        """Seconds of training, earlier runs included."""
        return time.time() - self.began

    def tick(self, shared: Shared, step: int) -> None:
        """Set the progress: 0 to 1 the trunk, 1 to 1.5 the first draft block, 1.5 to 2 all three."""
        trunk = (self.run.minutes - self.run.draft_minutes) * 60
        progress = self.elapsed / trunk
        if progress >= 1:
            progress = 1 + (self.elapsed - trunk) / max(1.0, self.run.draft_minutes * 60)
        if progress >= 1.5 and not self.copied:
            copy_first_draft(shared)
            self.copied = True
        stop = progress >= 2 or (self.run.max_steps and step >= self.run.max_steps)
        if (self.run.out / "STOP").exists():
            stop = True
        shared.control.copy_(torch.tensor([progress, float(bool(stop))], dtype=torch.float64))

    def note(self, shared: Shared, step: int, phase: str) -> None:
        """One log line."""
        now = time.time()
        n = self.run.rows * self.run.length * self.run.processes
        self.tokens += n
        line = {
            "step": step,
            "phase": phase,
            "progress": round(shared.control[0].item(), 4),
            "loss": round(shared.loss.mean().item(), 4),
            "tokens": self.tokens,
            "tok_s": round(n / (now - self.last)),
            "elapsed_s": round(self.elapsed),
        }
        self.last = now
        with (self.run.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")

    def save_due(self) -> bool:
        """Whether a checkpoint should be written now."""
        return time.time() - self.saved > self.run.save_every_s or (self.run.out / "SAVE").exists()

    def ask_save(self) -> None:
        """Tell the other processes."""
        (self.run.out / "SAVE").unlink(missing_ok=True)
        self.saved, self.want = time.time(), True


def copy_first_draft(shared: Shared) -> None:
    """Draft blocks 1 and 2 start as copies of block 0."""
    for name, p in shared.master.items():
        if name.startswith("mtp.0."):
            for k in (1, 2):
                other = name.replace("mtp.0.", f"mtp.{k}.")
                shared.master[other].copy_(p)
                shared.half[other].copy_(p)


def save_if_asked(run, shared, optimizer, mixer, rank, step, barrier, clock, silent) -> None:  # type: ignore[no-untyped-def]
    """Write a resumable checkpoint: each process its optimizer and place, process 0 the weights."""
    if rank == 0:
        shared.control[1] = 2.0 if clock.want else 0.0
    barrier.wait()
    wanted = shared.control[1].item() == 2.0
    barrier.wait()
    if not wanted:
        return
    _save(run.out / f"state-{rank}.pt", {"optimizer": optimizer.state(), "position": mixer.position})
    if rank == 0:
        clock.want = False
        shared.control[1] = 0.0
        meta = {"step": step, "tokens": clock.tokens, "elapsed": clock.elapsed}
        _save(run.out / "weights.pt", {"params": shared.master, "biases": shared.biases, "meta": meta})
    barrier.wait()


def _save(path: Path, content: object) -> None:
    torch.save(content, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def load_state(run: Run, silent: tuple[int, int]) -> tuple[Params, dict[str, Tensor], dict]:  # type: ignore[type-arg]
    """Fresh parameters, or those of an earlier run in the same folder."""
    shape = Shape()
    state: dict = {
        "step": 0,
        "tokens": 0,
        "elapsed": 0.0,
        "optimizers": None,
        "positions": None,
        "restarts": 0,
        "silent": silent,
    }  # type: ignore[type-arg]
    if not (run.out / "weights.pt").exists():
        return init_params(shape, run.seed), init_biases(shape), state
    saved = torch.load(run.out / "weights.pt")
    state |= saved["meta"]
    parts = [torch.load(run.out / f"state-{r}.pt") for r in range(run.processes)]
    state |= {
        "optimizers": [p["optimizer"] for p in parts],
        "positions": [p["position"] for p in parts],
        "restarts": saved["meta"]["step"],
    }
    print(f"going on at step {state['step']}, {state['tokens']:,} tokens", flush=True)
    return saved["params"], saved["biases"], state


def train(run: Run) -> None:
    """Prepare the text, train, save."""
    from tokenizers import Tokenizer

    run.out.mkdir(parents=True, exist_ok=True)
    sizes = build.prepare(run.out / "src", run.out / "data", run.seed)
    print(f"text: {sum(sizes.values()):,} tokens: {sizes}", flush=True)
    tokenizer = Tokenizer.from_file(str(run.out / "data" / "tokenizer.json"))
    silent = (tokenizer.token_to_id("<think>"), tokenizer.token_to_id("</think>"))
    params, biases, state = load_state(run, silent)
    shared = Shared(params, biases, run.processes)
    context = mp.get_context("spawn")
    barrier = context.Barrier(run.processes, timeout=1800)
    processes = [
        context.Process(target=worker, args=(r, run, shared, barrier, state)) for r in range(run.processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("A training process failed; see its traceback above.")
    began = state["elapsed"]
    meta = {"step": 0, "tokens": 0, "elapsed": began}
    log = run.out / "log.jsonl"
    if log.exists():
        last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
        meta = {"step": last["step"], "tokens": last["tokens"], "elapsed": last["elapsed_s"]}
    _save(run.out / "weights.pt", {"params": shared.master, "biases": shared.biases, "meta": meta})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="working folder: text, state, log, and the exported checkpoint",
    )
    parser.add_argument("--minutes", type=float, default=90.0, help="time of training, draft blocks included")
    parser.add_argument("--draft-minutes", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--max-steps", type=int, default=0)
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    parser.add_argument(
        "--sample", action="store_true", help="only answer some prompts with the saved weights"
    )
    parser.add_argument("--export", type=Path, help="only export the saved weights to this folder")
    parser.add_argument("--joint", action="store_true", help="train the trunk in the drafts' time too")
    parser.add_argument("--card", type=Path, help="only measure the exported checkpoint and write its card")
    a = parser.parse_args()
    run = Run(
        a.out,
        a.minutes,
        a.draft_minutes,
        a.processes,
        a.rows,
        a.length,
        compiled=not a.eager,
        max_steps=a.max_steps,
        joint=a.joint,
    )
    if a.card:
        from mini_training import card

        card.write(run.out, a.export or run.out / "checkpoint", a.card)
    elif a.sample:
        sample_answers(run.out)
    elif a.export:
        from mini_training.export import export_run

        export_run(run.out, a.export)
    else:
        print(
            f"training for {run.minutes:g} minutes, {run.processes} processes; log: {run.out / 'log.jsonl'}",
            flush=True,
        )
        train(run)
        from mini_training.export import export_run

        export_run(run.out, run.out / "checkpoint")
        from mini_training import card

        card.write(run.out, run.out / "checkpoint", run.out / "CARD.md")


if __name__ == "__main__":
    main()
