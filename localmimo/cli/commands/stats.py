"""`localmimo stats`: how often each expert of a layer was used, by a profile, and the tier that it is in now."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmimo.cli.options import Json, Plot, Quiet, Verbose, run_interruptible, ui_of
from localmimo.cli.packs import folder_of
from localmimo.cli.plots.plot import check_plot, draw_map, picture
from localmimo.cli.ui import Ui, table
from localmimo.errors import BadRequest, LocalMimoError
from quant.files.atomic import written_aside

if TYPE_CHECKING:
    from collections.abc import Mapping

    from localmimo.experts.policy.profile import Profile
    from localmimo.experts.store.placement import Placement

N_HOTTEST = 4  # experts named per layer
HOT_CODEC = "nf4-16"  # 4.5 bits


def stats(
    pack: Annotated[str, typer.Argument(metavar="PACK", help="Folder of a pack, or mimo-mini.")],
    profile: Annotated[str, typer.Option(metavar="NAME", help="Whose statistics.")] = "default",
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml", help="Write a recipe that gives the hottest experts 4.5 bits."),
    ] = None,
    hot_share: Annotated[
        float,
        typer.Option("--hot-share", metavar="SHARE", help="The part of each layer's experts that it names."),
    ] = 0.1,
    plot: Plot = None,
    as_json: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> int:
    """Show how often each expert of each layer was used, as earlier sessions counted it.

    And the tier it is in now, for every process that has the pack open with this profile."""

    ui = ui_of(verbose, quiet)
    return run_interruptible(
        lambda: run_stats(pack, profile, plot, ui, as_json=as_json, recipe=recipe, hot_share=hot_share)
    )


def run_stats(
    name: str,
    profile: str,
    plot: Path | None,
    ui: Ui,
    *,
    as_json: bool,
    recipe: Path | None = None,
    hot_share: float = 0.1,
) -> int:
    """Run the command; the exit code."""
    from localmimo.experts.store.placement import running

    check_plot(plot)
    _check_recipe(recipe, hot_share)
    folder = folder_of(name)
    counts, path = _layers(folder, profile)
    layers, found = list(counts), _profile(path, counts)
    held = running(path, counts)
    chances = (found.uses / max(found.tokens, 1e-9)).clip(0, 1)
    if plot is not None:
        names = ("expert", "layer", "tokens that use it, %")
        tiers = [placement.tiers for placement in held[:1]]
        picture(plot, lambda: draw_map(plot, 100 * chances, layers, names, *tiers), ui)
    if recipe is not None:
        rules = hot_rules(layers, chances.tolist(), hot_share)
        _write_recipe(recipe, rules, f"the hottest experts of {path}, {found.tokens:,.0f} tokens", ui)
    facts = [
        facts_of(layer, row.tolist())
        | {"held": {str(placement.pid): _held(placement, layer) for placement in held}}
        for layer, row in zip(layers, chances, strict=True)
    ]
    if as_json:
        head = {"pack": str(folder), "profile": profile, "file": str(path), "tokens": found.tokens}
        ui.json(head | {"layers": facts})
    else:
        ui.note(f" {path}: {found.tokens:,.0f} tokens")
        ui.data(report(facts))
    return 0


def _layers(folder: Path, profile: str) -> tuple[dict[int, int], Path]:
    """The MoE layers of a pack with their numbers of experts, and the file of a profile."""
    from localmimo.experts.policy.profile import profile_path
    from quant.pack.pack import Pack, experts_of

    with Pack.open(folder) as pack:
        return experts_of(pack), profile_path(folder, pack.id, profile)


def _profile(path: Path, counts: Mapping[int, int]) -> Profile:
    """What a profile says. Raises LocalMimoError where there is none."""
    from localmimo.experts.policy.profile import BadProfile, read_profile

    try:
        found = read_profile(path, len(counts), max(counts.values(), default=0))
    except BadProfile as error:
        raise LocalMimoError(
            f"The statistics in {path} cannot be used: the file {error}. Delete it."
        ) from None
    if found is None:
        raise LocalMimoError(
            f"There are no statistics in {path} yet: they are counted while a model answers, and "
            "saved when it closes (localmimo chat)."
        )
    return found


def _held(placement: Placement, layer: int) -> dict[str, int]:
    """Tier -> experts of a layer that a process has there now."""
    counts = {tier: placement.count(layer, tier) for tier in ("gpu", "ram")}
    return {tier: n for tier, n in counts.items() if n}


def _write_recipe(recipe: Path, rules: str, title: str, ui: Ui) -> None:
    with written_aside(recipe) as file:
        file.write(f"# {title}\n[rules]\n{rules}".encode())
    ui.note(
        f" {recipe}: {rules.count(HOT_CODEC)} experts get {HOT_CODEC}. localmimo quantize ... --recipe {recipe}"
    )


def _check_recipe(recipe: Path | None, hot_share: float) -> None:
    if not 0 < hot_share <= 1:
        raise BadRequest(
            f"--hot-share is a part of a layer's experts, above 0 and at most 1, not {hot_share:g}."
        )
    if recipe is not None and recipe.suffix != ".toml":
        raise BadRequest(f"A recipe is a .toml file: --recipe {recipe.with_suffix('.toml')}")


def hot_rules(layers: list[int], chances: list[list[float]], share: float) -> str:
    """Rules of a recipe: a finer codec for the hottest `share` of each layer's experts, as far as they were used."""
    lines = []
    for layer, row in zip(layers, chances, strict=True):
        hottest = sorted(range(len(row)), key=lambda expert: -row[expert])[: ceil(share * len(row))]
        lines += [
            f'"layers.{layer}.experts.{expert}.*" = "{HOT_CODEC}"\n'
            for expert in sorted(hottest)
            if row[expert] > 0
        ]
    return "".join(lines)


def facts_of(layer: int, chances: list[float]) -> dict[str, Any]:
    """Facts of a layer: the chance of each expert per token, and how few experts have half of the uses."""
    order = sorted(range(len(chances)), key=lambda expert: -chances[expert])
    half, total, n_half = sum(chances) / 2 - 1e-6, 0.0, 0
    while total < half:
        total += chances[order[n_half]]
        n_half += 1
    return {
        "layer": layer,
        "n_used": sum(chance > 0 for chance in chances),
        "half_of_uses": n_half,
        "hottest": order[:N_HOTTEST],
        "chances": [round(chance, 6) for chance in chances],
    }


def report(layers: list[dict[str, Any]]) -> str:
    """A line per layer: experts used at all, those that have half of the uses, the hottest; who holds how many now."""
    pids = list(layers[0]["held"]) if layers else []
    lines = []
    for facts in layers:
        named = "  ".join(f"{expert} ({facts['chances'][expert]:.0%})" for expert in facts["hottest"])
        n_used = f"{facts['n_used']} of {len(facts['chances'])}"
        held = [", ".join(f"{n} {tier}" for tier, n in facts["held"][pid].items()) or "-" for pid in pids]
        lines.append([str(facts["layer"]), n_used, str(facts["half_of_uses"]), *held, named])
    heads = ("layer", "used", "half of the uses", *(f"held by {pid}" for pid in pids))
    return table((*heads, "hottest (share of tokens)"), lines, left=0)
