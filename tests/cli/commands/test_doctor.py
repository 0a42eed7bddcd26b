"""`localmimo doctor`: every line says how it is, and what to do where it is not well."""

import json
import os
from pathlib import Path

import pytest
import torch

from localmimo.cli.commands import doctor
from localmimo.cli.ui import Ui
from tests.cli.program import localmimo


def test_a_healthy_machine_and_pack(nf4_pack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALMIMO_HOME", str(tmp_path / "home"))
    code, out, err = localmimo("doctor", str(nf4_pack), "--json")
    assert (code, err) == (0, "heavy: []\n")
    found = json.loads(out)
    findings = {finding["subject"]: finding for finding in found["findings"]}
    assert found["ok"] and {"versions", "kernels", "GPU", "memory", "pack"} <= findings.keys()
    assert findings["pack"]["verdict"] == "ok" and "every checksum holds" in findings["pack"]["found"]
    assert findings["disk"]["facts"]["together"] > 0
    assert all(f["fix"] for f in findings.values() if f["verdict"] != "ok")


def test_a_damaged_pack_fails(nf4_pack: Path, tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(nf4_pack, broken)
    file = broken / "experts-01.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    found = only(doctor._integrity(str(broken), quiet(), False))
    assert found.verdict == "fail" and "experts-01" in found.found and "Convert" in found.fix
    assert "nothing was read" in only(doctor._integrity(str(broken), quiet(), True)).found
    assert "There is no folder" in only(doctor._integrity(str(tmp_path / "nowhere"), quiet(), True)).found


def test_a_failure_is_exit_code_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCALMIMO_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "_kernels", lambda: iter(()))
    monkeypatch.setattr(doctor, "_disks", lambda pack, quick: lambda: iter(()))
    assert doctor.run_doctor(None, Ui.of_process(), as_json=False, quick=True) == 0
    assert doctor.run_doctor(str(tmp_path), Ui.of_process(), as_json=False, quick=True) == 1
    out = capsys.readouterr().out
    assert "✗ pack" in out and "→ Convert again" in out


def quiet() -> Ui:
    return Ui.of_process(quiet=True)


def only(findings: doctor.Findings) -> doctor.Finding:
    (finding,) = findings
    return finding


def test_huge_pages(tmp_path: Path) -> None:
    for text, verdict in (("always [madvise] never", "ok"), ("always madvise [never]", "warn")):
        (tmp_path / "enabled").write_text(text)
        found = only(doctor._huge_pages(tmp_path))
        assert found.verdict == verdict and bool(found.fix) == (verdict == "warn")
    assert only(doctor._huge_pages(tmp_path / "none")).verdict == "warn"


@pytest.mark.parametrize(
    ("script", "verdict", "says"),
    [
        ("echo 'NVIDIA H100, 81559 MiB, 550.54, 5, 16'", "ok", "H100, 81559 MiB, driver 550.54, PCIe 5 x16"),
        ("echo 'no devices were found' >&2; exit 6", "warn", "nvidia-smi fails: no devices were found"),
    ],
)
def test_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, verdict: str, says: str) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found, *others = doctor._gpu()
    assert found.verdict == verdict and says in found.found
    if verdict == "ok" and not torch.cuda.is_available():  # a card, and a torch that does not know it
        assert only(iter(others)).verdict == "warn" and "the CPU computes: " in others[0].found


def test_kinds_of_disks(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    for disk, rotational, says in (
        ("nvme0n1", "0", "NVMe drive"),
        ("sda", "1", "spinning disk"),
        ("vda", "0", "virtual disk"),
    ):
        root = tmp_path / disk
        (root / "devices" / disk / "queue").mkdir(parents=True)
        (root / "devices" / disk / "queue" / "rotational").write_text(rotational)
        (root / name).symlink_to(root / "devices" / disk)
        assert doctor.disk_kind(tmp_path, root) == f"{says} {disk}"
    assert "without a disk" in doctor.disk_kind(tmp_path, tmp_path / "none")


def test_a_home_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOCALMIMO_HOME", str(tmp_path / "file" / "home"))
    assert only(doctor._home()).verdict == "fail"
