"""Shared things of the face tests."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from localmimo.chat.tokenizer import Tokenizer
from tests.chat import bpe

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a pack has it, with a small byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("pack")
    bpe.small().save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [401, 400]}')
    (folder / "tokenizer_config.json").write_text(
        '{"eos_token": {"content": "<|im_end|>"}, "pad_token": null}'
    )
    (folder / "config.json").write_text('{"eos_token_id": 400, "model_type": "mimo_v2"}')
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.open(tokenizer_folder)
