"""The pages as a site: built strictly, whole, and in need of nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from chromium import Chromium
from html_page import Parsed

from ringmo.cli import build_parser
from ringmo.environment import VARIABLES

ROOT = Path(__file__).resolve().parents[2]


def build(
    target: Path, configuration: Path = ROOT / "mkdocs.yml"
) -> subprocess.CompletedProcess[str]:
    words = ["build", "--strict", "--config-file", str(configuration), "--site-dir", str(target)]
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", *words],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("site")
    done = build(made)
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def test_every_page_is_there_and_can_be_found(site: Path) -> None:
    index = Parsed((site / "index.html").read_text())
    linked = {a.get("href") for a in index.of("a")}
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    assert len(pages) > 15
    for page in pages:
        assert (site / page.with_suffix(".html")).is_file(), page
        # The overview is the page itself.
        assert page.name == "index.md" or page.with_suffix(".html").as_posix() in linked, page


def test_no_page_names_anything_elsewhere_that_a_browser_would_load(site: Path) -> None:
    loading = {
        "script": ("src",),
        "link": ("href",),
        "img": ("src", "srcset"),
        "iframe": ("src",),
        "source": ("src", "srcset"),
        "use": ("href", "xlink:href"),
        "object": ("data",),
    }
    files = sorted(site.rglob("*.html"))
    assert len(files) > 20
    for path in files:
        parsed = Parsed(path.read_text())
        for tag, names in loading.items():
            for attributes in parsed.of(tag):
                for name in names:
                    where = urlsplit(attributes.get(name) or "")
                    assert not where.netloc, f"{path.name}: <{tag} {name}={where.geturl()}>"
    for path in site.rglob("*.css"):
        text = path.read_text()
        assert not re.findall(r"""(?:url\(|@import)\s*["']?(?:https?:)?//""", text), path


def test_a_browser_without_a_network_shows_it(site: Path, tmp_path: Path) -> None:
    page_url = (site / "reference" / "command.html").as_uri()
    with Chromium(tmp_path / "browser", page_url) as page:
        page.wait("document.readyState === 'complete' && document.querySelector('nav')")
        page.call(
            "Network.emulateNetworkConditions",
            offline=True,
            latency=0,
            downloadThroughput=0,
            uploadThroughput=0,
        )
        page.call("Page.navigate", url=(site / "concepts.html").as_uri())
        page.wait("document.title.startsWith('Concepts')")
        picture = "document.querySelector('img[src$=\"concepts.svg\"]')"
        page.wait(f"{picture}.complete && {picture}.naturalWidth > 500")
        text = page.value("document.body.innerText")
        page.wait("document.querySelector('.md-search')")
        elsewhere = [
            u for u in page.requested if urlsplit(u).scheme not in ("file", "data", "blob")
        ]
        assert not elsewhere and not page.complaints
    assert "Tile store" in text and "Troubleshooting" in text


def test_the_reference_has_all_that_the_code_has(site: Path) -> None:
    command = Parsed((site / "reference" / "command.html").read_text()).text
    verbs = next(action.choices for action in build_parser()._actions if action.dest == "verb")
    for verb in verbs:
        assert f"ringmo {verb}" in command
    for words in ("--dry-run", "--with NAME=PATH", "the answer is no", "data set-aside"):
        assert words in command
    assert "--flow-run" not in command, "an argument that is not for people"
    variables = Parsed((site / "reference" / "environment.html").read_text()).text
    assert all(variable.name in variables for variable in VARIABLES)
    params = Parsed((site / "reference" / "params.html").read_text()).text
    for line in (ROOT / "params.yaml").read_text().splitlines():
        if said := line.partition("#")[2].strip():
            assert said in params or (line.startswith("#") and said.startswith(("Every", "`--rec")))
    python = Parsed((site / "reference" / "python.html").read_text()).text
    for name in ("ringmo.load", "TrainedModel", "embed", "write_timm", "Recorder", "Unreachable"):
        assert name in python


@pytest.mark.parametrize(
    "link, says",
    [
        ("[x](nowhere.md)", "nowhere.md"),
        ("[x](howto.md#nowhere)", "#nowhere"),
        ("[x](/absolute)", "absolute"),
    ],
)
def test_a_link_that_leads_nowhere_ends_it(tmp_path: Path, link: str, says: str) -> None:
    """With this project's own settings, on two pages."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text(f"# One\n\n{link}\n")
    (docs / "howto.md").write_text("# Two\n")
    settings = (ROOT / "mkdocs.yml").read_text()
    head, _, rest = settings.partition("\n# Where a page is not named here")
    validation = rest[rest.index("validation:") :]
    configuration = tmp_path / "mkdocs.yml"
    configuration.write_text(f"{head}\nplugins: []\n{validation}")
    done = build(tmp_path / "site", configuration)
    assert done.returncode != 0 and says in done.stdout + done.stderr
