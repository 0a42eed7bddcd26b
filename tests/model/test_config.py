"""config.json is read strictly: known keys are used, unknown ones named, other families refused."""

import json
from pathlib import Path

import pytest

from localmimo.errors import BadModel
from localmimo.model.config import ModelConfig
from tests.model.published import FLASH, PRO, parse
from tests.tiny import make_config


def test_flash() -> None:
    config = parse(FLASH)
    assert sum(spec.attention == "global" for spec in config.layers) == 9
    assert [i for i, spec in enumerate(config.layers) if spec.window is None] == [
        0,
        5,
        11,
        17,
        23,
        29,
        35,
        41,
        47,
    ]
    assert {spec.rotary_dim for spec in config.layers} == {64}
    assert config.layers[0].qkv_rows == (12288, 768, 512) and config.layers[1].qkv_rows == (12288, 1536, 1024)
    assert config.pages_per_token == 376 and config.layers[1].window == 128
    assert config.layers[0].rope_theta == 5e6 and config.layers[1].rope_theta == 1e4


def test_each_layer_kind_has_its_own_rotation() -> None:
    """`rope_parameters` as transformers writes them: a theta per kind of layer, in place of the flat keys."""
    both = {"full_attention": {"rope_theta": 3e6}, "sliding_attention": {"rope_theta": 2e4}}
    config = parse(FLASH, rope_parameters=both)
    assert {spec.rope_theta for spec in config.layers if spec.window is None} == {3e6}
    assert {spec.rope_theta for spec in config.layers if spec.window is not None} == {2e4}
    assert config.mtp_layer.rope_theta == 2e4
    for kind, (full, window) in (("full_attention", (3e6, 1e4)), ("sliding_attention", (5e6, 2e4))):
        config = parse(FLASH, rope_parameters={kind: both[kind]})  # the other one keeps its flat key
        assert (config.layers[0].rope_theta, config.layers[1].rope_theta) == (full, window)


def test_pro() -> None:
    config = parse(PRO)
    assert sum(spec.attention == "global" for spec in config.layers) == 10
    assert {spec.n_kv_heads for spec in config.layers} == {8}
    assert config.value_scale == 0.612 and config.pages_per_token == 552


def test_window_keys_override() -> None:
    assert ModelConfig.parse(make_config(), window_keys=129).layers[1].window == 129


def test_towers_change_nothing() -> None:
    towers = {
        "vision_config": {"depth": 28},
        "audio_config": {},
        "image_token_id": 151655,
        "video_start_token_id": 151670,
    }
    assert parse(FLASH, **towers) == parse(FLASH)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen3_moe"}, "qwen3_moe"),
        ({"attention_temperature": 2.0}, "attention_temperature"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"n_shared_experts": 1}, "n_shared_experts"),
        ({"n_group": 8}, "n_group"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"hybrid_layer_pattern": [0, 1]}, "2 entries.*48"),
        ({"num_experts_per_tok": 300}, "300.*256"),
        ({"num_key_value_heads": 5}, "64.*5"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": -4}, "hidden_size"),
        ({"layer_types": ["full_attention"] * 48}, "layer_types"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1.0}}}, "yarn"),
    ],
)
def test_what_is_refused_is_named(changes: dict[str, object], words: str) -> None:
    with pytest.raises(BadModel, match=words):
        parse(FLASH, **changes)


def test_a_missing_key_is_named() -> None:
    raw = make_config()
    del raw["moe_intermediate_size"]
    with pytest.raises(BadModel, match="moe_intermediate_size"):
        ModelConfig.parse(raw)


def test_broken_files(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="missing"):
        ModelConfig.open(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadModel, match="JSON"):
        ModelConfig.open(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(BadModel, match="list"):
        ModelConfig.open(tmp_path / "config.json")
