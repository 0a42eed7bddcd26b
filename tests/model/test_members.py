"""Every member's card: its config is understood, its tensors add up to the published totals."""

import pytest

from localmimo.model.config import ModelConfig
from localmimo.model.members import MEMBERS, Member, find_member, member_like
from quant import Recipe, Source
from quant.checkpoint.published import published_tensors
from quant.conversion.listing import make_listing

ONE_OF_A_KIND = [member for member in MEMBERS if not member.name.endswith("-base")]


def member(name: str) -> Member:
    found = find_member(name)
    assert found is not None
    return found


@pytest.mark.parametrize("card", MEMBERS, ids=lambda card: card.name)
def test_the_config_is_understood(card: Member) -> None:
    config = ModelConfig.parse(card.config)
    pro = "pro" in card.name
    assert [i for i, spec in enumerate(config.layers) if spec.window is None] == (
        [0, 7, 15, 23, 31, 39, 47, 55, 62, 69] if pro else [0, 5, 11, 17, 23, 29, 35, 41, 47]
    )
    assert {spec.n_heads for spec in config.layers} == {128 if pro else 64}
    assert {(s.attention, s.n_kv_heads) for s in config.layers} == {
        ("global", 8 if pro else 4),
        ("window", 8),
    }
    assert {(s.rotary_dim, s.head_dim, s.v_head_dim) for s in config.layers} == {(64, 192, 128)}
    assert {spec.rope_theta for spec in config.layers} == {5e6 if "v2-flash" in card.name else 1e7, 1e4}
    assert (config.eps, config.router_bf16) == ((1e-6, True) if "v2.6" in card.name else (1e-5, False))
    assert config.value_scale == (0.612 if pro else 0.707)
    assert config.max_context == (262_144 if "v2-flash" in card.name else 1_048_576)
    assert config.pages_per_token == (552 if pro else 376) and config.n_mtp == 3


@pytest.mark.parametrize(
    ("name", "n_tensors", "n_elements"),
    [("mimo-v2.5", 73_081, 310_775_040_000), ("mimo-v2.5-pro", 159_581, 1_023_244_718_976)],
)
def test_published_totals(name: str, n_tensors: int, n_elements: int) -> None:
    """Files, tensors and elements as counted in public dumps of the checkpoints, towers and scales included."""
    tensors = list(published_tensors(member(name).config))
    assert (len(tensors), sum(t.n_elements for t in tensors)) == (n_tensors, n_elements)
    assert member(name).n_elements == n_elements


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [("mimo-v2-flash", 309e9, 15e9), ("mimo-v2-pro", 1e12, 42e9), ("mimo-v2.6-flash", 309e9, 15e9)],
)
def test_the_size_in_the_name(name: str, parameters: float, active: float) -> None:
    config = ModelConfig.parse(member(name).config)
    per_expert = 3 * config.hidden * config.expert_inner
    dense = sum(
        t.n_elements
        for t in published_tensors(member(name).config)
        if t.name.endswith(".weight") and ".experts." not in t.name and ".mtp." not in t.name
    )
    total = dense + per_expert * config.n_experts * len(config.moe_layers)
    assert total == pytest.approx(parameters, rel=0.025)
    assert dense + per_expert * config.pages_per_token == pytest.approx(active, rel=0.05)


def test_a_described_checkpoint_is_priced_to_the_byte() -> None:
    source = Source.described(member("mimo-v2.5").config, "MiMo-V2.5")
    assert source.skipped == {"audio_encoder.": 75, "speech_embeddings": 20, "visual.": 364}
    listing = make_listing(source, Recipe())
    assert listing.model == "MiMo-V2.5" and listing.page is not None
    assert (listing.total_bytes, listing.page.bytes) == (168_851_907_464, 13_373_440)
    assert any("364 of visual.*" in note for note in listing.notes)


def test_every_member_has_its_server_but_the_one_without_weights() -> None:
    for card in MEMBERS:
        command = card.serve_command()
        assert (command is None) == (card.name == "mimo-v2-pro")
        assert command is None or f"--model-path {card.repository} " in command


def test_names() -> None:
    assert find_member("MiMo-V2-Flash") is MEMBERS[0]
    assert find_member("mimo-v3") is None
    for card in ONE_OF_A_KIND:
        like = member_like(card.config)
        assert like is not None and (like is card or card.name == "mimo-v2-pro")
    assert member_like({}) is None
