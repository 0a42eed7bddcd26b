"""What all tests share: how many processes run them, where they keep things, what is random; a tokenizer, packs and
engines. Imports no torch before a test asks for it."""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from localmimo.chat.tokenizer import Tokenizer
from tests.chat import bpe

if TYPE_CHECKING:
    from localmimo.engine import Engine

MAX_WORKERS = 8  # each takes up to 1 GB
HOME = pytest.StashKey[str]()

# The same examples in every run; `pytest --hypothesis-profile=fresh` draws others, and prints how to repeat a failure.
settings.register_profile(
    "fixed", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.register_profile("fresh", settings.get_profile("fixed"), derandomize=False, print_blob=True)
settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed", type=int, default=0, help="other draws of random, numpy and torch (default: 0)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """A LOCALMIMO_HOME of the tests' own, one for all workers: the user's is neither read nor written."""
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        # They share the cores, and a thread that waits for another one spins. torch reads this when it is imported.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, n_cores() // int(workers))))
    else:
        config.stash[HOME] = tempfile.mkdtemp(prefix="localmimo-tests-")
        os.environ["LOCALMIMO_HOME"] = config.stash[HOME]


def pytest_unconfigure(config: pytest.Config) -> None:
    if HOME in config.stash:
        shutil.rmtree(config.stash[HOME], ignore_errors=True)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker per core. None for files and tests that are named, which start sooner without, and none for the slow
    ones and those on a GPU, which measure memory and time."""
    named = all(".py" in argument for argument in config.args)
    if named or n_cores() == 1 or "not slow and not gpu" not in config.option.markexpr:
        return 0
    return min(n_cores(), MAX_WORKERS)


def n_cores() -> int:
    return len(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def seeds(request: pytest.FixtureRequest) -> None:
    """Draws without a seed of their own depend on the test's name and on --seed alone, in whatever order tests run."""
    seed = zlib.crc32(f"{request.node.nodeid} {request.config.getoption('--seed')}".encode())
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


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


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of the packs in `tests.packs.PACKS`, each made once, for tests that only read; beside it its checkpoint
    as `hf`. An engine on one gets `profile=None`: a profile would be kept in it."""
    from tests.packs import PACKS, make_pack

    @cache
    def made(name: str) -> Path:
        return make_pack(tmp_path_factory.mktemp(name), **PACKS[name])

    return made


@pytest.fixture
def nf4_pack(packs: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts in nf4 and the rest in int8: a copy that the test may change."""
    return shutil.copytree(packs("nf4"), tmp_path_factory.mktemp("nf4") / "pack")


@pytest.fixture
def bf16_pack(packs: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All in bfloat16, as the checkpoint has it: a copy that the test may change."""
    return shutil.copytree(packs("bf16"), tmp_path_factory.mktemp("bf16") / "pack")


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Opened for one test as the mark `engine` says: the fixture of a pack, or None for the embedded model, and the
    options of `load`. It takes ten milliseconds, and no test sees what another one left."""
    from localmimo.engine import load

    mark = request.node.get_closest_marker("engine")
    assert mark is not None, "pytestmark = pytest.mark.engine(PACK, context=...) says what to open"
    (name,) = mark.args
    with load(name and request.getfixturevalue(name), **mark.kwargs) as engine:
        yield engine
