"""Optimizer of named float32 parameters: Muon for matrices, Adam for the rest. Its work can be divided between
processes.

Muon: momentum, then the nearest orthogonal matrix by five Newton-Schulz steps (Jordan et al. 2024, public
blog post). Knows tensors and learning rates; it must not know the model or the data.
"""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MUON_LR, MUON_MOMENTUM, DECAY = 0.02, 0.95, 0.02
ADAM_LR = {"embed": 0.008, "head": 0.004}
ADAM_LR_OTHER = 0.003
BETAS = (0.9, 0.95)


def orthogonal(update: Tensor) -> Tensor:
    """The matrices of update [..., rows, cols] with all singular values near 1, in bfloat16."""
    a, b, c = COEFFICIENTS
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).bfloat16() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def is_matrix(name: str) -> bool:
    """Whether Muon takes the parameter."""
    return (
        (".attn." in name and not name.endswith("sink"))
        or ".mlp." in name
        or ".experts." in name
        or name.endswith("proj")
    )


def _matrices(name: str, x: Tensor) -> Tensor:
    """Stacked gate and up rows are two matrices."""
    return x.unflatten(-2, (2, -1)) if name.endswith("gate_up") else x


class Optimizer:
    """State and step of the parameters with the given names. `params` are updated in place."""

    def __init__(self, params: dict[str, Tensor], names: list[str]) -> None:
        self.params, self.names, self.steps = params, names, 0
        self.first = {n: torch.zeros_like(params[n]) for n in names}
        self.second = {n: torch.zeros_like(params[n]) for n in names if not is_matrix(n)}

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], scale: float) -> None:
        """One update; `scale` in [0, 1] multiplies every learning rate."""
        self.steps += 1
        for name in self.names:
            if is_matrix(name):
                self._muon(name, grads[name], scale)
            else:
                self._adam(name, grads[name], scale)

    def _muon(self, name: str, grad: Tensor, scale: float) -> None:
        momentum = self.first[name].mul_(MUON_MOMENTUM).add_(grad, alpha=1 - MUON_MOMENTUM)
        update = _matrices(name, grad.lerp(momentum, MUON_MOMENTUM))
        stretch = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
        lr = MUON_LR * scale
        param = self.params[name]
        param.mul_(1 - lr * DECAY)
        param.add_(orthogonal(update).reshape(param.shape), alpha=-lr * stretch)

    def _adam(self, name: str, grad: Tensor, scale: float) -> None:
        lr = ADAM_LR.get(name, ADAM_LR_OTHER) * scale
        first = self.first[name].lerp_(grad, 1 - BETAS[0])
        second = self.second[name].lerp_(grad.square(), 1 - BETAS[1])
        c1, c2 = 1 - BETAS[0] ** self.steps, 1 - BETAS[1] ** self.steps
        self.params[name].addcdiv_(first, (second / c2).sqrt_().add_(1e-8), value=-lr / c1)

    def state(self) -> dict[str, object]:
        """The state to save in a checkpoint."""
        return {"steps": self.steps, "first": self.first, "second": self.second}

    def load(self, state: dict[str, object]) -> None:
        """Copy a saved state, whose names and shapes must be the same."""
        self.steps = state["steps"]  # type: ignore[assignment]
        for own, saved in ((self.first, state["first"]), (self.second, state["second"])):
            for name in own:
                own[name].copy_(saved[name])  # type: ignore[index]


def shares(params: dict[str, Tensor], parts: int) -> list[list[str]]:
    """The names divided into `parts` lists of about equal work."""
    out: list[list[str]] = [[] for _ in range(parts)]
    load = [0.0] * parts
    for name in sorted(params, key=lambda n: -params[n].numel() * (6 if is_matrix(n) else 1)):
        part = load.index(min(load))
        out[part].append(name)
        load[part] += params[name].numel() * (6 if is_matrix(name) else 1)
    return out
