"""What `make audit`, `make sbom` and `make licences` say is so."""

import datetime
import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci" / "dependencies.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dependencies", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "version": "1", "vulns": [], **more}


HOLE = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2"]}


def test_a_known_hole_fails_and_says_what_mends_it(script: ModuleType, capsys: Any) -> None:
    assert script.told([package("a"), package("b", vulns=[HOLE])], [], "pypi") == 1
    said = capsys.readouterr()
    assert "b 1: PYSEC-1, mended by 2" in said.err and "audited 2 packages" in said.out


def test_an_allowed_hole_passes_by_any_of_its_names(script: ModuleType, capsys: Any) -> None:
    allowed = [{"package": "b", "id": "CVE-1", "reason": "not reached"}]
    assert script.told([package("b", vulns=[HOLE])], allowed, "pypi") == 0
    other = [{"package": "a", "id": "CVE-1", "reason": "another package"}]
    assert script.told([package("b", vulns=[HOLE])], other, "pypi") == 1
    assert "no longer found: a CVE-1" in capsys.readouterr().out


def test_where_nobody_can_be_asked_it_is_said(
    script: ModuleType, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(script, "asked", lambda service: "no such host")
    assert script.audit() == 0
    said = capsys.readouterr().out
    assert said.startswith("NOT AUDITED: no network") and "audited 3" not in said


def test_a_mirror_that_knows_no_package_has_not_audited_them(
    script: ModuleType, monkeypatch: Any
) -> None:
    """pip-audit itself says `No known vulnerabilities found` there."""

    def skipped(command: list[str], **_: Any) -> Any:
        report = Path(command[command.index("--output") + 1])
        lines = [{"name": name, "skip_reason": "not found on PyPI"} for name in ("a", "b")]
        report.write_text(json.dumps({"dependencies": lines}))
        return subprocess.CompletedProcess(command, 0, "", "No known vulnerabilities found")

    monkeypatch.setattr(script.subprocess, "run", skipped)
    assert script.asked("pypi") == "it knows none of 2 packages"


def test_entries_of_the_allow_list_have_reasons_and_days(
    script: ModuleType, tmp_path: Path, monkeypatch: Any
) -> None:
    assert all(entry["reason"] for entry in script.allowed("licence"))
    script.allowed("hole")
    (tmp_path / ".ci").mkdir()
    monkeypatch.setattr(script, "ROOT", tmp_path)
    written = tmp_path / ".ci" / "allowed.toml"
    written.write_text('[[hole]]\nid = "CVE-1"\npackage = "a"\nreason = " "\n')
    with pytest.raises(SystemExit, match="no reason"):
        script.allowed("hole")
    written.write_text('[[hole]]\nid = "CVE-1"\npackage = "a"\nreason = "x"\nuntil = 2026-01-01\n')
    with pytest.raises(SystemExit, match="its day"):
        script.allowed("hole", datetime.date(2026, 1, 2))
    assert script.allowed("hole", datetime.date(2026, 1, 1))


@pytest.mark.parametrize(
    "text, no",
    [
        ("MIT", False),
        ("GPL-3.0-or-later", True),
        ("GNU Affero General Public License v3", True),
        ("Apache-2.0 OR GPL-2.0-or-later", False),
        ("LGPL-3.0", False),
        ("GNU Library or Lesser General Public License (LGPL)", False),
        ("CC-BY-NC-4.0", True),
        ("BUSL-1.1", True),
        ("unknown", True),
        ("LicenseRef-NVIDIA-Proprietary", True),
    ],
)
def test_licences_that_are_refused(script: ModuleType, text: str, no: bool) -> None:
    assert script.refused(text) is no


def test_the_installed_packages_have_licences_that_may_be_used() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "licences"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| torch |" in (ROOT / "build" / "licences.md").read_text()


def test_the_sbom_names_what_is_installed() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "sbom"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bom = json.loads((ROOT / "build" / "sbom.cdx.json").read_text())
    assert bom["bomFormat"] == "CycloneDX" and bom["metadata"]["component"]["name"] == "ringmo"
    found = {part["name"]: part for part in bom["components"]}
    for name in ("torch", "mlflow", "prefect", "dvc"):
        assert found[name]["version"] == version(name)
        assert found[name]["purl"] == f"pkg:pypi/{name}@{version(name)}"
    assert sum("licenses" in part for part in found.values()) > 0.9 * len(found)
    needs = {one["ref"]: one.get("dependsOn", []) for one in bom["dependencies"]}
    assert found["numpy"]["bom-ref"] in needs[found["rasterio"]["bom-ref"]]
