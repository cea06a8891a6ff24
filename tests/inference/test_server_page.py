"""The page at `/`, in a real browser: an image goes in, the answer is drawn on it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium import Chromium
from PIL import Image
from served import Served, write_task_model
from small_models import rgb

from ringmo import tasks
from ringmo.workspace import init

pytestmark = pytest.mark.slow

TOKEN = "a token"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("page")
    models = [write_task_model(folder / kind, kind) for kind in tasks.names()]
    server = Served(
        init(folder / "workspace"),
        *(word for model in models for word in ("--model", str(model))),
        environment={"RINGMO_SERVE_TOKEN": TOKEN},
    )
    yield server
    assert server.stop() == 0


def grey(page: Chromium) -> bool:
    """Whether the canvas shows nothing but the grey image."""
    return bool(
        page.value("""(() => {
            const c = document.getElementById("canvas");
            const p = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
            return p.every((value, i) => value === (i % 4 === 3 ? 255 : 128));
        })()""")
    )


def set_strength(page: Chromium, share: int) -> None:
    """The overlay's slider, as a person moves it."""
    page.value(
        f"(() => {{ const s = document.getElementById('strength'); s.value = {share};"
        "s.dispatchEvent(new Event('input')); })()"
    )


def test_every_task_s_answer_is_drawn(served: Served, tmp_path: Path) -> None:
    plain = np.full((40, 50, 3), 128, np.uint8)  # what is coloured then is the answer
    Image.fromarray(plain).save(tmp_path / "grey.png")
    Image.fromarray(rgb(1)).save(tmp_path / "noise.png")
    (tmp_path / "no.png").write_text("no image")
    with Chromium(tmp_path / "profile", f"{served.url}/?model=scene") as page:
        page.wait("!document.getElementById('token-row').hidden")
        page.value(f"document.getElementById('token').value = '{TOKEN}'")
        page.value("document.getElementById('token-use').click()")
        page.wait("document.body.dataset.state === 'ready'")
        assert page.value("document.getElementById('model').value") == "scene"
        page.drop(".drop", tmp_path / "noise.png")
        page.wait("document.body.dataset.state === 'answered'")
        names = page.value("[...document.querySelectorAll('.bar span[title]')].map((s) => s.title)")
        assert sorted(names) == ["airport", "forest", "river"]
        assert page.value("document.getElementById('words').textContent") == names[0]
        assert "scene-" in page.value("document.getElementById('about').textContent")

        for kind in tasks.names():
            page.value(
                f"document.getElementById('model').value = '{kind}';"
                "document.getElementById('model').onchange()"
            )
            page.wait("document.body.dataset.state === 'ready'")
            page.choose(".drop input", tmp_path / "grey.png")
            if kind == "change":
                assert page.value("document.body.dataset.state") == "ready"
                page.choose(".drop[data-name=second] input", tmp_path / "noise.png")
            page.wait("document.body.dataset.state === 'answered'")
            assert page.value("document.getElementById('canvas').width") >= 50
            drawn = kind != "scene"
            if kind == "oriented":  # untrained, it may be sure of nothing
                drawn = page.value("shown.told.boxes.some((box) => box.score >= shown.told.sure)")
            assert grey(page) != drawn, kind
            if kind in ("segmentation", "height"):
                set_strength(page, 0)
                assert grey(page)
                set_strength(page, 50)
                assert not grey(page)

        page.choose(".drop input", tmp_path / "no.png")
        page.wait("document.body.dataset.state === 'error'")
        assert "not an image" in page.value("document.getElementById('error').textContent")
        assert {url.split("?")[0].removeprefix(served.url)[:8] for url in page.requested} <= {
            *("/", "/models", "/predict", "about:bl", "data:ima", "data:,"),
        }
        # 401 before the token and 415 of what is no image are told by the browser, nothing else.
        assert [one for one in page.complaints if "401" not in one and "415" not in one] == []


def test_the_docs_page_shows_what_can_be_asked(served: Served, tmp_path: Path) -> None:
    with Chromium(tmp_path / "profile", f"{served.url}/docs") as page:
        page.wait("document.querySelectorAll('section').length >= 6")
        assert "/predict/{name}" in page.value("document.body.innerText")
        assert "window" in page.value("document.getElementById('body').textContent")
        assert page.complaints == []
