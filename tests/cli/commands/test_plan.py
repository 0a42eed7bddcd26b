"""`localmimo plan`: exact structure, honest ranges, exit codes, no torch."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from localmimo.cli.commands.plan import Planner, PlanOptions
from localmimo.errors import DoesNotFit
from localmimo.experts.policy.trace import Trace
from localmimo.hardware import measurements
from localmimo.hardware.bandwidth import ASSUMED, Speeds, file_spots, measure_disk, measure_ram, scratch_spots
from localmimo.hardware.host import Machine
from localmimo.model.config import ModelConfig
from localmimo.model.members import find_member
from localmimo.planning.footprint import Footprint, footprint_of
from localmimo.planning.hit_rates import assumed_hits, profile_hits, replayed_hits
from localmimo.planning.memory import Plan, make_plan
from localmimo.planning.throughput import Tiers, decode_range, disk_rates, estimate
from tests.cli.program import localmimo
from tests.tiny import make_checkpoint

DESCRIBED = ("--disk-read", "7GB/s", "--ram-read", "80GB/s")
FAST = Speeds(disk_read=7e9, disk_read_alone=4e9, ram_read=80e9)


def plan(*arguments: str) -> dict:
    code, out, err = localmimo("plan", *arguments, *DESCRIBED, "--json")
    assert (code, err) == (0, "heavy: []\n"), err
    return json.loads(out)


def flash() -> Footprint:
    card = find_member("mimo-v2-flash")
    assert card is not None
    return Footprint(
        name="flash",
        kind="described",
        config=ModelConfig.parse(card.config),
        codecs="nf4",
        pack_bytes=168_851_907_464,
        source_bytes=None,
        dense_bytes=6_917_000_000,
        lookup_bytes=1_249_902_592,
        page_bytes=13_373_440,
        member=card,
    )


def test_a_family_name_before_any_download() -> None:
    found = plan("mimo-v2-flash", "--ram", "96GiB", "-c", "32k")
    assert (found["pack_bytes"], found["plan"]["page_bytes"]) == (168_851_907_464, 13_373_440)
    assert found["ram_slots"] + found["disk_pages"] == found["plan"]["n_pages"] == 12_032
    low, high = found["estimate"]["decode_tps"]
    assert 0 < low < high and found["serve"].startswith("python3 -m sglang.launch_server")
    assert found["hit_rate_origin"].startswith("assumed") and found["longest_context"] == 262_144
    assert footprint_of("XiaomiMiMo/MiMo-V2-Flash").name == found["model"]


def test_a_pack_says_the_same_as_the_engine(nf4_pack: Path) -> None:
    from localmimo import load

    found = plan(str(nf4_pack), "--ram", "64MiB", "-c", "256")
    with load(nf4_pack, ram="64MiB", context=256) as engine:
        assert found["plan"] == json.loads(json.dumps(engine.plan.as_dict()))
    assert found["pack_bytes"] == sum(f.stat().st_size for f in nf4_pack.glob("*.safetensors"))


def test_a_checkpoint_folder_and_its_config_alone_agree(tmp_path: Path, nf4_pack: Path) -> None:
    folder = make_checkpoint(tmp_path / "hf", layout="fused-fp8", mtp=3)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((folder / "config.json").read_bytes())
    whole = plan(str(folder), "--ram", "64MiB", "-c", "256")
    assert whole["kind"] == "checkpoint"
    for name in (alone, alone / "config.json"):
        found = plan(str(name), "--ram", "64MiB", "-c", "256")
        assert found["kind"] == "described"
        assert all(found[key] == whole[key] for key in ("plan", "pack_bytes", "source_bytes"))


def planner(**question: object) -> Planner:
    machine = Machine(ram_bytes=128 << 30, free_ram_bytes=120 << 30, n_cores=16)
    return Planner(flash(), machine, FAST, PlanOptions("flash", **question))  # type: ignore[arg-type]


def test_what_does_not_fit_says_what_would_help() -> None:
    with pytest.raises(DoesNotFit, match=r"Give --ram \d+MiB .* longest context that fits is") as refused:
        planner(ram="14GiB", context=262_144).answer()
    longest = int(str(refused.value).split("--context ")[-1].rstrip("."))
    assert planner(ram="14GiB", context=longest).answer().plan.n_slots >= 376
    with pytest.raises(DoesNotFit):
        planner(ram="14GiB", context=longest + 1).answer()
    assert planner(ram="14GiB", max_context=True).answer().plan.context == longest
    with pytest.raises(DoesNotFit, match="No context is short enough"):
        planner(ram="8GiB").answer()
    with pytest.raises(DoesNotFit, match=r"Give --ram \d+MiB\. No shorter context helps") as refused:
        planner(ram="4GiB", vram="24GiB").answer()
    assert "KV" not in str(refused.value).split("Give")[0]


def test_a_refusal_in_json(nf4_pack: Path) -> None:
    code, out, err = localmimo("plan", str(nf4_pack), "--ram", "1MiB", *DESCRIBED, "--json")
    found = json.loads(out)
    assert code == 3 and found["fits"] is False and found["needed_bytes"] > found["ram_bytes"] == 1 << 20
    assert found["longest_context"] == 0
    assert "Give --ram " in err


def test_a_gpu_is_arithmetic_and_says_so(nf4_pack: Path) -> None:
    found = planner(ram="64GiB", vram="24GiB").answer()
    assert found.tiers.gpu_slots > 1000
    assert found.tiers.gpu_slots + found.tiers.ram_slots + found.tiers.disk_pages == 12_032
    assert found.tiers.ram_slots * found.plan.page_bytes <= 64 << 30
    alone = planner(ram="64GiB").answer()
    assert found.estimate.decode_tps[0] > alone.estimate.decode_tps[0]
    assert planner(ram="64GiB", vram="4GiB").answer().tiers.gpu_slots == 0
    code, out, _ = localmimo(
        "plan", str(nf4_pack), "--ram", "64MiB", "-c", "256", "--vram", "1GiB", *DESCRIBED
    )
    assert code == 0 and "not yet measured" in out and "nothing was placed on it" in out
    assert "\n longest context " in out and "with the fewest experts in memory\n" in out
    code, out, _ = localmimo(
        "plan", str(nf4_pack), "--ram", "64MiB", "-c", "4096", "--vram", "8GiB", *DESCRIBED
    )
    assert code == 0 and re.search(
        r"as the context grows +GPU experts \d+ at first, \d+ at 4,096 tokens \(KV \+ ", out
    )
    assert f" speed is an estimate. Check it: localmimo bench {nf4_pack} --check-plan\n" in out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("mimo-v9",), 4, "no member of the family"),
        (("PACK", "-c", "1m"), 2, "4,096 positions"),
        (("PACK", "--kv", "int3"), 2, "--kv"),
        (("PACK", "--disk-read", "fast"), 2, "7GB/s"),
        (("PACK", "--experts", "nf3"), 2, "nf3"),
        (("PACK", "--max-context", "-c", "64"), 2, "leave out --context"),
        (("PACK", "--pcie", "25GB/s"), 2, "give --vram too"),
        (("PACK", "--remeasure", *DESCRIBED), 2, "nothing to measure"),
        (("PACK", "--trace", "/no/such"), 2, "--trace: /no/such cannot be read (No such file or directory)"),
    ],
)
def test_bad_questions(nf4_pack: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    arguments = tuple(str(nf4_pack) if word == "PACK" else word for word in arguments)
    got, _, err = localmimo("plan", *arguments, "--ram", "96GiB")
    assert got == code and says in err and "Traceback" not in err


def test_an_mxfp4_checkpoint_is_not_run_as_it_is(tmp_path: Path) -> None:
    from localmimo.cli.packs import pack_folder
    from localmimo.errors import BadModel

    folder = make_checkpoint(tmp_path / "hf", layout="fused-mxfp4", mtp=0, num_hidden_layers=2)
    with pytest.raises(BadModel, match="MXFP4 experts keep their values.*localmimo quantize"):
        pack_folder(folder)


# ---- arithmetic ----


def budget_of(model: Footprint) -> Plan:
    """96 GiB, which do not hold every expert."""
    return make_plan(
        model.config,
        dense_bytes=model.dense_bytes,
        page_bytes=model.page_bytes,
        context=32_768,
        ram_bytes=96 << 30,
        slack=16,
    )


def test_more_hits_and_faster_parts_are_never_slower() -> None:
    model = flash()
    budget = budget_of(model)
    before = (0.0, 0.0)
    for tenth in range(11):
        low, high = decode_range(model, budget, [FAST], tenth / 10, depth=1000)
        assert low >= before[0] and high >= before[1] and high <= 2 * low * 1.0001
        before = (low, high)
    assert before[1] <= FAST.ram_read / (376 * model.page_bytes)
    everything = Tiers(0, budget.n_slots, budget.n_pages, (1.0, 1.0), "")
    assert estimate(model, budget, FAST, everything, n_cores=16).disk_bytes == (0.0, 0.0)
    slow = estimate(model, budget, ASSUMED, everything, n_cores=16)
    assert slow.decode_tps[0] < estimate(model, budget, FAST, everything, n_cores=16).decode_tps[0]


def test_a_cache_that_answers_widens_the_range_of_a_small_pack_alone() -> None:
    cached = replace(FAST, disk_again=2 * FAST.disk_read)
    assert cached.disk_cached and not FAST.disk_cached and cached.as_dict()["disk_cached"] is True
    assert disk_rates(FAST, 8, 5 << 30) == (FAST.disk_read, FAST.disk_read)
    slow, fast = disk_rates(cached, 8, 5 << 30)
    assert fast == cached.disk_again and slow == pytest.approx(2**0.5 * FAST.disk_read)
    slow, fast = disk_rates(cached, 8, 160_000_000_000)
    assert fast == pytest.approx(1.1 * FAST.disk_read) and FAST.disk_read < slow < fast
    assert disk_rates(FAST, 0.5, 5 << 30) == (FAST.disk_read_alone, FAST.disk_read)


def test_speeds_measured_twice_span_a_range() -> None:
    model, slower = flash(), replace(FAST, disk_read=5e9, disk_read_alone=3e9, ram_read=60e9)
    budget = budget_of(model)
    first, later, both = (
        decode_range(model, budget, speeds, 1.0, depth=1000) for speeds in ([FAST], [slower], [FAST, slower])
    )
    assert both == pytest.approx((later[0], first[1])) or both[1] / both[0] == pytest.approx(2)
    assert later[0] < first[0] and later[1] < first[1]
    known = replace(FAST, products=40e9, layer_s=0.0002)
    low, high = decode_range(model, budget, [known], 1.0, depth=1000)
    bytes_s = (model.read_bytes + 376 * model.page_bytes) / 40e9
    assert low < 1 / (bytes_s + 48 * 0.0002 + 0.001) < high < 2 * low  # 1 ms: who stays


def test_assumed_hit_rates_pass_through_the_published_points() -> None:
    assert assumed_hits(0.125, 0.03) == pytest.approx((0.59, 0.67))
    assert assumed_hits(0.25, 0.03) == pytest.approx((0.74, 0.81))
    assert assumed_hits(1.0, 0.03) == (1.0, 1.0)
    shares = [assumed_hits(n / 100, 0.03) for n in range(101)]
    assert shares == sorted(shares) and all(low <= high for low, high in shares)
    assert assumed_hits(0.1, 0.5)[0] <= 0.1


def test_a_trace_is_replayed() -> None:
    config = flash().config
    again, ever_new = Trace(), Trace()
    for step in range(8):
        for layer in config.moe_layers:
            again.add(layer, list(range(8)))
            ever_new.add(layer, [(8 * step + k) % 256 for k in range(8)])
    assert replayed_hits(again, config, 376) == (1.0, 1.0)
    assert replayed_hits(ever_new, config, 376) == (0.0, 0.0)
    low, high = replayed_hits(again, config, 188)
    assert 0 <= low <= high <= 0.51


def test_a_profile_gives_what_its_hottest_pages_answer(nf4_pack: Path) -> None:
    from localmimo import load

    asked = (nf4_pack, footprint_of(nf4_pack).pack[1], footprint_of(nf4_pack).config)  # type: ignore[index]
    assert profile_hits(*asked, 8) is None
    with load(nf4_pack, ram="64MiB", context=512) as engine, engine.session() as session:
        for token in range(100):  # an answer might end sooner
            session.step(token % 50)
    few, many = profile_hits(*asked, 8), profile_hits(*asked, 32)
    assert few is not None and many is not None and 0 < few < many == 1.0
    found = plan(str(nf4_pack), "--ram", "64MiB", "-c", "256")
    assert found["hit_rate_origin"] == "every expert is in memory"


def test_measuring_a_disk_and_memory(tmp_path: Path) -> None:
    scratch, spots = scratch_spots(tmp_path, 100_000)
    found = measure_disk(spots[:64], 100_000, seed=0)
    assert found.again >= found.together >= found.alone > 1e6
    assert file_spots([scratch], 100_000) == spots
    assert measure_ram(1, 1 << 22) > 1e8


def test_what_a_measured_plan_says(nf4_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setenv("LOCALMIMO_HOME", str(tmp_path))
    ask = ("plan", str(nf4_pack), "--ram", "64MiB", "-c", "256")
    page, device = footprint_of(nf4_pack).page_bytes, nf4_pack.stat().st_dev
    measurements.keep("ram", {"read": 2e10})
    disk = {"together": 1e9, "alone": 5e8, "again": 1.1e9, "direct": True}
    measurements.keep(f"disk {device} {page}", disk)
    out = localmimo(*ask)[1]
    assert "disk 1.0 GB/s of pages four at a time, 500 MB/s one at a time (measured)" in out
    assert "a cache answers" not in out and "kept for a week: --remeasure." in out
    measurements.keep(f"disk {device} {page}", disk | {"again": 2e9})
    out = localmimo(*ask)[1]
    assert "just read come again at 2.0 GB/s: a cache answers, which may hold all of this pack\n" in out
    found = json.loads(localmimo(*ask, "--json")[1])
    assert found["speeds"]["disk_cached"] is True and found["speeds"]["disk_again"] == 2e9


def test_a_measurement_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from localmimo.hardware import bandwidth as speeds

    monkeypatch.setenv("LOCALMIMO_HOME", str(tmp_path))
    measurements.keep("ram", {"read": 5e9})
    assert speeds.ram_speed(1) == 5e9
    (tmp_path / measurements.CACHE).write_text("{")
    assert measurements.kept("ram") is None


def test_structure_of_a_pack_counts_what_a_token_reads(nf4_pack: Path) -> None:
    found = footprint_of(nf4_pack)
    assert 0 < found.lookup_bytes < found.dense_bytes
    assert found.read_bytes + found.lookup_bytes == found.dense_bytes
    assert found.experts_bytes == found.page_bytes * 8 * 4
