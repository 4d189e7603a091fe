"""The report's page in a real browser: wide and narrow, light and dark, one run and several."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reporting.reports import make_run, write

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine"),
]
LONG = "a class of a very long name that goes on and on"

# Sizes in pixels as rendered: an SVG's text is scaled with its picture.
TEXTS = """() => {
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || element.closest("script, style, desc, title")) continue;
    const svg = element.closest("svg");
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    found.push([parseFloat(getComputedStyle(element).fontSize) * scale, walk.currentNode.textContent.trim()]);
  }
  return found;
}"""
CONTRASTS = """() => {
  const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const parts = c => c.match(/[\\d.]+/g).map(Number);
  const luminance = c => { const [r, g, b] = parts(c).map(linear); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor; if ((parts(c)[3] ?? 1) > 0) return c; } return "rgb(255,255,255)"; };
  // Numbers inside markers have the paper's colour and stand on the marker's, not on the paper.
  const paper = e => e.style.fill.includes("--paper");
  return [...document.querySelectorAll("body, p, h1, h2, h4, h4 span, dt, dd, td, th, caption, figcaption, a, button,"
    + " .numbers div, .numbers b, .tiles span, code, svg text")].filter(e => !paper(e)).map(e => {
    const style = getComputedStyle(e), inside = e.closest("svg");
    const a = luminance(inside ? style.fill : style.color), b = luminance(behind(e));
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName + " " + e.textContent.trim().slice(0, 40)];
  });
}"""
CUT = """() => [...document.querySelectorAll("svg.chart")].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter(text => {
    const own = text.getBoundingClientRect();
    return own.left < box.left - 1 || own.right > box.right + 1 || own.top < box.top - 2 || own.bottom > box.bottom + 2;
  }).map(text => text.textContent);
})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    names = [LONG, "<b>", "c", "d & e", "f", "g"]
    cases = {
        "one": [make_run(names=names)],
        "several": [
            make_run(exits=4, classes=30, name="first run"),
            make_run(exits=2, classes=30, name=LONG.replace(" ", "_"), policy=False),
            make_run(exits=2, classes=3, images=30, name="third", evaluation=False),
        ],
        "bare": [make_run(exits=1, classes=2, policy=False, evaluation=False)],
    }
    return {
        case: write(runs, folder / case, published="imagenet" if case == "several" else None).page
        for case, runs in cases.items()
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as player:
        started = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=["light", "dark"])
def scheme(request) -> str:
    return request.param


WIDE, NARROW = (1280, 900), (400, 800)
PAGES = [
    pytest.param("one", WIDE, id="one-wide"),
    pytest.param("several", NARROW, id="several-narrow"),
    pytest.param("one", NARROW, id="one-narrow", marks=pytest.mark.full),
    pytest.param("several", WIDE, id="several-wide", marks=pytest.mark.full),
    pytest.param("bare", WIDE, id="bare-wide", marks=pytest.mark.full),
    pytest.param("bare", NARROW, id="bare-narrow", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("case", "size"), PAGES)
def test_page_shows_well(browser, pages, case, size, scheme):
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page = context.new_page()
    trouble: list[str] = []
    page.on("console", lambda m: trouble.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("requestfailed", lambda request: trouble.append(f"failed: {request.url[:80]}"))
    page.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:")) else trouble.append(request.url),
    )
    page.goto(pages[case].as_uri())
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    texts = page.evaluate(TEXTS)
    assert len(texts) > 50
    assert [text for text in texts if text[0] < 11] == []
    assert [one for one in page.evaluate(CONTRASTS) if one[0] < 4.5] == []
    assert page.evaluate(CUT) == []
    widths = page.evaluate("[...document.images].map(i => i.complete ? i.naturalWidth : 0)")
    assert all(width > 0 for width in widths)
    assert bool(widths) == (case != "bare")
    assert page.evaluate(
        "[...document.querySelectorAll('svg.chart')].every(s => s.getBoundingClientRect().width > 200)"
    )
    assert trouble == []
    context.close()


def test_toggle_and_download(browser, pages, scheme):
    context = browser.new_context(color_scheme=scheme, accept_downloads=True)
    page = context.new_page()
    page.goto(pages["one"].as_uri())

    def ground() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    before = ground()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "theme"
    page.keyboard.press("Enter")
    assert ground() != before
    assert page.evaluate("document.documentElement.dataset.theme") == {"light": "dark", "dark": "light"}[scheme]
    page.click("#theme")
    assert ground() == before
    with page.expect_download() as found:
        page.click("#download")
    assert json.loads(Path(found.value.path()).read_text())["runs"][0]["name"] == "digits"
    context.close()
