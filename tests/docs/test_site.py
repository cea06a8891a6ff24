"""The pages as a site: built strictly, whole, and in need of nothing from elsewhere."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
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


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """The site, served on this machine alone."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def test_a_browser_shows_and_searches_it_with_nothing_from_elsewhere(
    address: str, tmp_path: Path
) -> None:
    with Chromium(tmp_path / "browser", f"{address}concepts.html", size=(1400, 900)) as page:
        picture = "document.querySelector('img[src$=\"concepts.svg\"]')"
        page.wait(f"{picture}.complete && {picture}.naturalWidth === 1000")
        assert "Troubleshooting" in page.value("document.body.innerText")
        field = "document.querySelector('.md-search__input')"
        page.value(f"{field}.focus(); {field}.value = 'rollback'")
        page.value(f"{field}.dispatchEvent(new Event('keyup', {{bubbles: true}}))")
        page.wait("document.querySelector('.md-search-result__item a')")
        elsewhere = [
            one
            for one in page.requested
            if not one.startswith((address, "data:", "blob:")) and one != "about:blank"
        ]
        assert not elsewhere and not page.complaints


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


def test_links_that_lead_nowhere_end_it(tmp_path: Path) -> None:
    """With this project's own settings, on two pages."""
    docs = tmp_path / "docs"
    docs.mkdir()
    links = ("nowhere.md", "howto.md#nowhere", "/absolute", "a folder/")
    text = "\n".join(f"[x](<{link}>)\n" for link in links)
    (docs / "index.md").write_text(f"# One\n\n{text}")
    (docs / "howto.md").write_text("# Two\n")
    settings = (ROOT / "mkdocs.yml").read_text()
    head, _, rest = settings.partition("\n# Where a page is not named here")
    configuration = tmp_path / "mkdocs.yml"
    validation = rest[rest.index("validation:") :]
    configuration.write_text(f"{head}\nplugins: []\n{validation}")
    done = build(tmp_path / "site", configuration)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and all(link in said for link in links), said
