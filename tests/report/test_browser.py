"""The report in a real browser: a phone and a screen, light and dark; any Chromium on the PATH, or KDLIT_BROWSER."""

from __future__ import annotations

import pytest

from kdlit.losses import CrossEntropyLoss, KDLoss
from kdlit.modules import ClassificationDistillation
from kdlit.report import report_html
from kdlit.runs import Run, find_runs
from tests.conftest import TinyData, TinyNet
from tests.report.browser import NAMES, Browser, find_browser
from tests.report.cases import write_run

# What reaches beyond the window without a box of its own to scroll in.
TOO_WIDE = """[...document.querySelectorAll("body *")].filter(one => one.getBoundingClientRect().right > innerWidth + 1
    && !one.closest(".scroll, .box, nav, svg, .skip")).map(one => one.outerHTML.slice(0, 200))"""
BACKGROUND = "getComputedStyle(document.body).backgroundColor"
SMALLEST = """Math.min(...[...document.querySelectorAll(".panels svg.drawing")].map(svg => {
    const text = svg.querySelector("text");
    return parseFloat(getComputedStyle(text).fontSize) * svg.getScreenCTM().a; }))"""


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the PATH, nor is KDLIT_BROWSER set")
    one = Browser(program)
    yield one
    one.close()


@pytest.fixture(scope="module")
def pages(browser, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("pages")
    losses = {"ce": CrossEntropyLoss(), "kd": KDLoss()}
    module = ClassificationDistillation(TinyNet(), losses, teacher=TinyNet(), input_size=(3, 8, 8))
    runs = [
        write_run(tmp_path / "one", everything=True),
        write_run(tmp_path / ("a_run_with_a_name_that_is_far_too_long_" * 4)),
    ]
    found = [tmp_path / "one.html", tmp_path / "both.html"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "rebuild", lambda self: (module.eval(), TinyData()))
        found[0].write_text(report_html(find_runs(runs[:1]), pictures=2), encoding="utf-8")
        found[1].write_text(report_html(find_runs(runs), without_networks=True), encoding="utf-8")
    return found


def test_a_page_fits_every_window_and_theme_and_asks_for_nothing_but_itself(browser, pages):
    for path in pages:
        backgrounds = set()
        for width in (360, 1280):
            for dark in (False, True):
                browser.show(path, width, dark)
                assert browser.ask("document.documentElement.scrollWidth") <= width, (path.name, width)
                assert browser.ask(TOO_WIDE) == [], (path.name, width)
                assert browser.ask(SMALLEST) >= 9, width
                backgrounds.add(browser.ask(BACKGROUND))
        assert len(backgrounds) == 2
        assert browser.ask("[...document.images].every(one => one.complete && one.naturalWidth > 0)")
        assert browser.ask("document.compatMode") == "CSS1Compat"
    assert browser.complaints() == []
    assert {url.rpartition("/")[2] for url in browser.requested()} == {"one.html", "both.html"}


def test_the_button_changes_the_theme_and_scripts_of_others_do_not_run(browser, pages, tmp_path):
    hostile = tmp_path / "hostile.html"
    hostile.write_text(pages[0].read_text().replace("</main>", "<script>document.title = 'taken'</script></main>"))
    browser.show(hostile, 360)
    assert "taken" not in browser.ask("document.title")
    before = browser.ask(BACKGROUND)
    browser.ask("document.getElementById('theme').click()")
    assert browser.ask(BACKGROUND) != before
    browser.ask("document.getElementById('theme').click()")
    assert browser.ask(BACKGROUND) == before


def test_it_prints(browser, pages, tmp_path):
    browser.show(pages[0], 1280, dark=True)
    browser.pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
