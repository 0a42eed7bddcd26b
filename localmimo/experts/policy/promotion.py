"""Promotion: which pages are worth a slot on the GPU. Pure decisions over chances and costs; no torch, no bytes.

A page takes the place of another only where the time that its expected uses will save there exceeds that of the copy.
A free slot is worth filling in any case: it makes room in RAM.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from localmimo.experts.policy.baselines import Page

HORIZON = 64  # tokens that a page is expected to stay
SHARE = 0.25  # of a token's time that copies may take


@dataclass(frozen=True, slots=True)
class Costs:
    """What a page's use saves on the GPU, and what bringing it there costs; seconds, measured."""

    saved_s: float  # a use on the CPU less a use on the GPU
    upload_s: float


@dataclass(frozen=True, slots=True)
class Swap:
    """`page` goes to the GPU, into the slot of `instead` or, if that is None, into a free one."""

    page: Page
    instead: Page | None


def pays_back(chance: float, chance_instead: float, costs: Costs) -> bool:
    """Whether the uses expected within the horizon, beyond those of the page that leaves, pay for the copy."""
    return (chance - chance_instead) * HORIZON * costs.saved_s > costs.upload_s


def most_uploads(token_s: float, costs: Costs) -> int:
    """Copies that a token's time has room for, at least one."""
    return max(1, int(SHARE * token_s / costs.upload_s)) if costs.upload_s > 0 else 1


def choose(
    in_ram: Mapping[Page, float], on_gpu: Mapping[Page, float], n_free: int, most: int, costs: Costs
) -> list[Swap]:
    """Up to `most` swaps, the likeliest pages first: into free slots, then those that pay back.

    The mappings hold chances per token.
    """
    coming = sorted(in_ram, key=lambda page: (-in_ram[page], page))[:most]
    leaving = sorted(on_gpu, key=lambda page: (on_gpu[page], page))
    swaps: list[Swap] = []
    for page in coming:
        instead = leaving[len(swaps) - n_free] if n_free <= len(swaps) < n_free + len(leaving) else None
        if len(swaps) >= n_free and instead is None:
            break
        if instead is not None and not pays_back(in_ram[page], on_gpu[instead], costs):
            break
        swaps.append(Swap(page, instead))
    return swaps
