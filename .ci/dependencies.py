"""What ringmo stands on, looked at: known holes, a list for others (SBOM), licences.

    python .ci/dependencies.py audit       known holes of the pinned packages (constraints.txt)
    python .ci/dependencies.py sbom        build/sbom.cdx.json, CycloneDX, of what is installed here
    python .ci/dependencies.py licences    build/licences.md; exit code 1 where one is refused

What may pass all the same stands in .ci/allowed.toml, with its reason.
"""

import argparse
import datetime
import fnmatch
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
SERVICES = ("pypi", "osv")  # that pip-audit can ask, in this order
WAIT_S = 15
# Licences that ask of users what Apache-2.0 does not, or that forbid a use.
REFUSED = re.compile(
    r"\bA?GPL|(?<!Lesser )General Public|Affero|SSPL|Server Side Public|BUSL|Business Source"
    r"|Proprietary|Non-?Commercial|\bNC\b|^unknown$",
    re.I,
)


def allowed(kind: str, today: datetime.date | None = None) -> list[dict[str, Any]]:
    """Entries of .ci/allowed.toml.

    Raises:
        SystemExit: one has no reason, or its day has passed.
    """
    written = tomllib.loads((ROOT / ".ci" / "allowed.toml").read_text())
    entries: list[dict[str, Any]] = written.get(kind, [])
    for entry in entries:
        named = entry.get("id") or entry["package"]
        if not str(entry.get("reason", "")).strip():
            raise SystemExit(f".ci/allowed.toml: {named}: no reason given")
        if entry.get("until") and entry["until"] < (today or datetime.date.today()):
            day = entry["until"]
            raise SystemExit(f".ci/allowed.toml: {named}: look again, its day ({day}) has passed")
    return entries


# Known holes


def audit() -> int:
    """0: none is known but those allowed, or nobody could be asked, which is said. 1: some are."""
    entries = allowed("hole")
    why = []
    for service in SERVICES:
        found = asked(service)
        if isinstance(found, str):
            why.append(f"{service}: {found}")
            continue
        return told(found, entries, service)
    print(f"NOT AUDITED: no network to a list of known holes ({'; '.join(why)})")
    return 0


def asked(service: str) -> list[dict[str, Any]] | str:
    """What pip-audit learnt of each package; or why it learnt nothing."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        done = subprocess.run(
            [
                *(
                    sys.executable,
                    "-m",
                    "pip_audit",
                    "--requirement",
                    str(ROOT / "constraints.txt"),
                ),
                *("--no-deps", "--disable-pip", "--vulnerability-service", service),
                *("--timeout", str(WAIT_S), "--progress-spinner", "off"),
                *("--format", "json", "--output", str(report)),
            ],
            capture_output=True,
            text=True,
        )
        if not report.exists():
            return (done.stderr.strip().splitlines() or ["it said nothing"])[-1][:100]
        packages: list[dict[str, Any]] = json.loads(report.read_text())["dependencies"]
    # A mirror that serves packages alone knows none of them, and pip-audit then finds no hole.
    if all("skip_reason" in package for package in packages):
        return f"it knows none of {len(packages)} packages"
    return packages


def told(packages: list[dict[str, Any]], entries: list[dict[str, Any]], service: str) -> int:
    """Print what was found; the exit code."""
    open_holes, unused = [], list(entries)
    for package in packages:
        for hole in package.get("vulns", []):
            names = {hole["id"], *hole.get("aliases", [])}
            known = [
                one for one in entries if one["package"] == package["name"] and one["id"] in names
            ]
            unused = [one for one in unused if one not in known]
            if not known:
                mended = ", ".join(hole.get("fix_versions", [])) or "no version yet"
                open_holes.append(
                    f"{package['name']} {package['version']}: {hole['id']}, mended by {mended}"
                )
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    print(f"audited {len(packages) - len(skipped)} packages of constraints.txt ({service})")
    if skipped:
        print(f"NOT AUDITED: {len(skipped)}, which it does not know: {', '.join(skipped)}")
    for one in unused:
        print(f"allowed, and no longer found: {one['package']} {one['id']}")
    for line in open_holes:
        print(f"KNOWN HOLE: {line}", file=sys.stderr)
    return 1 if open_holes else 0


# What is installed


def installed() -> list[Distribution]:
    """Packages of this environment, each once, by name; without ringmo itself."""
    found = {named(one): one for one in distributions()}
    return [found[name] for name in sorted(found) if name != "ringmo"]


def named(one: Distribution) -> str:
    return re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower()


def licence(one: Distribution) -> str:
    """What a package says of its licence: an expression, else classifiers, else its own words."""
    about = one.metadata
    if expression := about.get("License-Expression"):
        return str(expression)
    kinds = [
        kind.rpartition(" :: ")[2]
        for kind in about.get_all("Classifier", [])
        if kind.startswith("License ::")
    ]
    own = str(about.get("License") or "").strip().splitlines()
    if own and (not kinds or kinds == ["OSI Approved"] or "|" in own[0]):
        return own[0][:80]
    return " / ".join(kind for kind in kinds if kind != "OSI Approved") or "unknown"


def refused(text: str) -> bool:
    """Whether each of the licences that may be chosen from is one of those refused."""
    return all(REFUSED.search(choice) for choice in re.split(r" OR | / |\|", text))


def sbom() -> int:
    """Write build/sbom.cdx.json: name, version, licence and address of all that is installed."""
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    made = LicenseFactory()
    bom = Bom()
    version = next(one.version for one in distributions() if named(one) == "ringmo")
    bom.metadata.component = Component(
        name="ringmo",
        version=version,
        type=ComponentType.APPLICATION,
        licenses=[made.make_from_string("Apache-2.0")],
        bom_ref="ringmo",
    )
    parts = {}
    for one in installed():
        name, text = named(one), licence(one)
        url = PackageURL("pypi", name=name, version=one.version)
        parts[name] = Component(
            name=name,
            version=one.version,
            type=ComponentType.LIBRARY,
            purl=url,
            bom_ref=str(url),
            licenses=[] if text == "unknown" else [made.make_from_string(text)],
        )
        bom.components.add(parts[name])
    for one in installed():
        needs = [parts[name] for name in needed(one) if name in parts]
        bom.register_dependency(parts[named(one)], needs)
    bom.register_dependency(bom.metadata.component, parts.values())
    BUILD.mkdir(exist_ok=True)
    path = BUILD / "sbom.cdx.json"
    path.write_text(JsonV1Dot6(bom).output_as_string(indent=1) + "\n")
    print(f"{len(parts)} packages in {path}")
    return 0


def needed(one: Distribution) -> Iterator[str]:
    """Names of what a package requires, whatever its extras."""
    for text in one.requires or []:
        name = re.match(r"[A-Za-z0-9._-]+", text)
        if name and "extra ==" not in text:
            yield re.sub(r"[-_.]+", "-", name[0]).lower()


def licences() -> int:
    """Write build/licences.md; 1 where a licence is refused and has no entry in allowed.toml."""
    entries = allowed("licence")
    rows, wrong = [], []
    for one in installed():
        name, text = named(one), licence(one)
        reason = next((e["reason"] for e in entries if fnmatch.fnmatch(name, e["package"])), "")
        if refused(text) and not reason:
            wrong.append(f"{name} {one.version}: {text}")
        rows.append(f"| {name} | {one.version} | {text.replace('|', 'or')} | {reason} |")
    BUILD.mkdir(exist_ok=True)
    head = [
        "# Licences of what ringmo is installed with\n",
        "| package | version | licence | why |",
    ]
    (BUILD / "licences.md").write_text("\n".join([*head, "|---|---|---|---|", *rows, ""]))
    print(f"{len(rows)} packages in {BUILD / 'licences.md'}, {len(wrong)} refused")
    for line in wrong:
        print(f"REFUSED: {line}: replace it, or say in .ci/allowed.toml why not", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = {"audit": audit, "sbom": sbom, "licences": licences}
    parser.add_argument("what", choices=what)
    sys.exit(what[parser.parse_args().what]())
