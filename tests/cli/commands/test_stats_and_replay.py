"""`localmimo replay` and `localmimo stats`: exact output, JSON, pictures, and what they refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from localmimo import load
from localmimo.cli.app import run
from localmimo.experts.policy.profile import profile_path
from localmimo.experts.policy.router_stats import RouterStats
from localmimo.experts.policy.trace import TraceWriter
from localmimo.experts.store.placement import running, withdraw
from quant import Pack
from quant.conversion.recipe import Recipe


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Layers 1 and 2 of 8 experts, two a token: one always, one in turn."""
    path = tmp_path / "trace.jsonl"
    with TraceWriter(path) as writer:
        for step in range(20):
            for layer in (1, 2):
                writer.write(step, layer, [0, 1 + step % 6])
    return path


def test_replay_prints_a_table(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["replay", str(trace), "--slots", "6,14,14"]) == 0
    out, err = capsys.readouterr()
    assert err == " 20 tokens, 2 layers, 80 requests: 4.0 pages a token\n"
    head, *rows = out.splitlines()
    assert head == " slots     LRU     LFU    ours  Belady  LRU to Belady"
    assert rows[1] == "    14  82.5 %  82.5 %  82.5 %  82.5 %              -"
    assert [row.split()[0] for row in rows] == ["6", "14"]


def test_replay_as_json(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["replay", str(trace), "--slots", "6", "--json", "-q"]) == 0
    out, err = capsys.readouterr()
    (result,) = json.loads(out.splitlines()[-1])
    assert err == ""
    assert {"slots": 6, "requests": 80}.items() <= result.items()
    assert result.keys() == {"slots", "requests", "ours", "lru", "lfu", "belady"}
    assert 0 <= result["lru"] <= result["ours"] <= result["belady"] <= 0.825


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_pictures(trace: Path, tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / f"curve.{suffix}"
    assert run(["replay", str(trace), "--slots", "4,6,9", "--plot", str(plot)]) == 0
    assert f"The picture is in {plot}." in capsys.readouterr().err
    assert plot.read_bytes().startswith(b"<?xml" if suffix == "svg" else b"\x89PNG")


def test_what_is_refused(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> tuple[int, str]:
        code = run(["replay", *arguments])
        out, err = capsys.readouterr()
        assert out == ""
        return code, err

    assert refused(str(trace)) == (2, "error: Missing option '--slots'. See localmimo replay --help.\n")
    assert refused("no-such-file", "--slots", "3") == (2, "error: There is no file no-such-file.\n")
    assert refused(str(trace), "--slots", "0")[0] == 2
    assert "give numbers from 1" in refused(str(trace), "--slots", "3,0")[1]
    assert "write a number" in refused(str(trace), "--slots", "3,,x")[1]
    assert ".svg or .png" in refused(str(trace), "--slots", "3", "--plot", "x.gif")[1]
    assert "no folder" in refused(str(trace), "--slots", "3", "--plot", str(tmp_path / "no" / "x.png"))[1]
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    code, err = refused(str(bad), "--slots", "3")
    assert code == 2 and err.startswith(f'error: {bad}, line 1: "step" must be a whole number')


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for command, flags in {
        "replay": ("--slots", "--plot", "--json"),
        "stats": ("--profile", "--recipe", "--hot-share", "--plot", "--json"),
    }.items():
        assert run([command, "--help"]) == 0
        said = capsys.readouterr().out
        assert all(flag in said for flag in flags)


def test_neither_loads_torch(trace: Path) -> None:
    code = (
        "import sys; from localmimo.cli.app import run; "
        f"run(['replay', {str(trace)!r}, '--slots', '6', '--json']); run(['stats', '/nowhere']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


# ---- stats ----


@pytest.fixture
def profiled_pack(bf16_pack: Path) -> Path:
    """A pack with four MoE layers of eight experts, and a profile of ten tokens."""
    with Pack.open(bf16_pack) as opened:
        stats = RouterStats((1, 2, 3, 4), 8)
        for token in range(10):
            for layer in stats.layers:
                stats.request(layer, [layer, 0 if token < 4 else 7])
        assert stats.save(profile_path(bf16_pack, opened.id, "code"))
    return bf16_pack


def test_stats_prints_a_line_per_layer(profiled_pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["stats", str(profiled_pack), "--profile", "code"]) == 0
    out, err = capsys.readouterr()
    assert err.endswith("code.safetensors: 10 tokens\n")
    assert out.splitlines()[:2] == [
        " layer    used  half of the uses           hottest (share of tokens)",
        "     1  3 of 8                 1  1 (100%)  7 (60%)  0 (40%)  2 (0%)",
    ]
    assert len(out.splitlines()) == 5


def test_stats_as_json(profiled_pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["stats", str(profiled_pack), "--profile", "code", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (facts["tokens"], facts["profile"]) == (10.0, "code")
    assert facts["layers"][1]["chances"] == [0.4, 0, 1, 0, 0, 0, 0, 0.6]


def test_a_recipe_for_the_hottest(
    profiled_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "hot.toml"
    assert (
        run(["stats", str(profiled_pack), "--profile", "code", "--recipe", str(file), "--hot-share", "0.25"])
        == 0
    )
    assert f"{file}: 8 experts get nf4-16." in capsys.readouterr().err
    recipe = Recipe.load(file)
    assert recipe.rules[:2] == (("layers.1.experts.1.*", "nf4-16"), ("layers.1.experts.7.*", "nf4-16"))
    assert (recipe.experts, recipe.dense) == ("nf4", "int8")
    for bad in (["--recipe", "hot.txt"], ["--hot-share", "0"], ["--hot-share", "1.5"]):
        assert run(["stats", str(profiled_pack), *bad]) == 2


def test_where_the_experts_lie_now(
    nf4_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def held() -> list[dict[str, dict[str, int]]]:
        assert run(["stats", str(nf4_pack), "--json"]) == 0
        return [it["held"] for it in json.loads(capsys.readouterr().out.splitlines()[-1])["layers"]]

    with load(nf4_pack, context=128) as engine:
        engine.generate("first words", max_tokens=3)
    assert held() == [{}] * 4  # nobody has it open
    with load(nf4_pack, context=128) as engine:
        engine._store.wait_until_warm(30)
        engine.generate("more words", max_tokens=3)
        mine = str(os.getpid())
        assert [it[mine]["ram"] for it in held()] == [
            sum(at == layer for at, _ in engine._store.where()) for layer in engine.config.moe_layers
        ]
        assert run(["stats", str(nf4_pack)]) == 0
        assert f"held by {mine}" in capsys.readouterr().out
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert run(["stats", str(nf4_pack), "--plot", str(tmp_path / "map.png")]) == 0
        out, err = capsys.readouterr()
        assert (
            "matplotlib is not installed" in err and "hottest" in out and not (tmp_path / "map.png").exists()
        )
    assert held() == [{}] * 4 and not list((nf4_pack / "stats").glob("*.placement"))


@pytest.mark.parametrize(
    "said",
    [
        b"", b"[" * 5000, b'{"pid": 1}', b'{"pid": 1, "began": 0, "tiers": {"1": "rr"}}',
        b'{"pid": -5, "began": 0, "tiers": {}}', b'{"pid": 1e999, "began": 0, "tiers": {}}', b"\xff\xfe",
    ],
)  # fmt: skip
def test_leftovers_and_nonsense_hold_nothing(tmp_path: Path, said: bytes) -> None:
    (tmp_path / "default.1.placement").write_bytes(said)
    assert running(tmp_path / "default.safetensors", {1: 2}) == []


def test_what_a_killed_process_said_is_cleared_away(tmp_path: Path) -> None:
    profile, gone = tmp_path / "default.safetensors", subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for pid in (gone.pid, os.getppid(), os.getpid()):
        (tmp_path / f"default.{pid}.placement").write_text("{}")
    strange = [f"default.{name}.placement" for name in ("9" * 30, "0" * 12 + "9" * 30, "-1", "2.7", "x")]
    for name in strange:
        (tmp_path / name).write_text("{}")
    withdraw(profile)
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {f"default.{os.getppid()}.placement", *strange}


def test_a_map_of_experts(profiled_pack: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert (
        run(["stats", str(profiled_pack), "--profile", "code", "--plot", str(tmp_path / "map.svg"), "-q"])
        == 0
    )
    assert (
        b"tokens that use it" in (tmp_path / "map.svg").read_bytes()
        or (tmp_path / "map.svg").stat().st_size > 5000
    )


def test_no_statistics_bad_ones_and_no_pack(
    profiled_pack: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["stats", str(profiled_pack), "--profile", "story"]) == 1
    assert "There are no statistics in" in capsys.readouterr().err
    assert run(["stats", str(profiled_pack), "--profile", "a/b"]) == 2
    (profiled_pack / "stats" / "broken.safetensors").write_bytes(b"x" * 100)
    assert run(["stats", str(profiled_pack), "--profile", "broken"]) == 1
    assert "cannot be used: the file has 100 bytes where 4 layers" in capsys.readouterr().err
    assert run(["stats", str(tmp_path)]) == 4
