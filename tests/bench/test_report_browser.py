"""The pages in a real headless Chromium: they render, say nothing on the console, ask for nothing, and pass axe."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = importlib.util.find_spec("playwright"), importlib.util.find_spec("axe_playwright_python")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
    pytest.mark.skipif(None in DRIVER, reason="needs playwright and axe-playwright-python: make setup"),
]
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1200, "height": 900}


def pages():
    """Those of `test_report_pages`: pytest imports test files one by one, so this one is loaded by its path."""
    path = Path(__file__).with_name("test_report_pages.py")
    spec = importlib.util.spec_from_file_location("report_pages_for_the_browser", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.PAGES


def suite_page_of_the_repository(folder):
    """The page that `rkd suite --table-only` makes of the committed result files."""
    results = folder / "results"
    shutil.copytree(ROOT / "results", results)
    command = [sys.executable, "-m", "rkd", "suite", str(ROOT / "suites" / "cpu.toml"), "--table-only", "--results"]
    subprocess.run([*command, str(results)], check=True, capture_output=True, timeout=120)
    return (results / "cpu" / "report.html").read_text(encoding="utf-8")


PAGES = pages()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All pages by name."""
    return PAGES | {"suite": suite_page_of_the_repository(tmp_path_factory.mktemp("suite"))}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


class Visit:
    """One page, open, with all that it said and asked for."""

    def __init__(self, browser, path, **options):
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()


@pytest.fixture
def visit(browser, made, tmp_path):
    def open_page(name, **options):
        path = tmp_path / f"{name}.html"
        path.write_text(made[name], encoding="utf-8")
        return Visit(browser, path, **options)

    return open_page


@pytest.mark.parametrize("name", ["run", "run-hostile", "result", "result-hostile", "result-none", "suite"])
def test_a_page_renders_says_nothing_and_asks_for_nothing(visit, made, name):
    with visit(name, viewport=DESK) as seen:
        assert seen.page.locator("h1").is_visible()
        assert seen.page.locator("svg").count() == made[name].count("<svg")
        assert all(seen.page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0)"))
    assert seen.said == []
    assert [url for url in seen.asked if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("name", ["run", "result", "result-hostile", "suite"])
@pytest.mark.parametrize("viewport", [PHONE, DESK], ids=["phone", "desk"])
def test_a_page_is_as_wide_as_its_window(visit, name, viewport):
    """Wide tables scroll inside of their own box; nothing widens the page."""
    with visit(name, viewport=viewport) as seen:
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


@pytest.mark.parametrize(
    ("viewport", "scheme"),
    [
        pytest.param(DESK, "light", id="desk-light"),
        pytest.param(PHONE, "dark", id="phone-dark"),
        pytest.param(DESK, "dark", id="desk-dark", marks=pytest.mark.promise),
        pytest.param(PHONE, "light", id="phone-light", marks=pytest.mark.promise),
    ],
)
@pytest.mark.parametrize("name", ["run", "result", "suite"])
def test_axe_finds_no_violation(visit, name, viewport, scheme):
    from axe_playwright_python.sync_playwright import Axe

    with visit(name, viewport=viewport, color_scheme=scheme, bypass_csp=True) as seen:
        found = Axe().run(seen.page).response["violations"]
    assert [(rule["id"], [node["html"][:120] for node in rule["nodes"][:3]]) for rule in found] == []


@pytest.mark.parametrize("name", ["run", "result"])
def test_dark_and_light_differ_and_paper_is_white(visit, name):
    def background(**options):
        with visit(name, **options) as seen:
            return seen.page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = background(color_scheme="light"), background(color_scheme="dark")
    assert light != dark
    with visit(name, color_scheme="dark") as seen:
        seen.page.emulate_media(media="print")
        assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_a_page_prints(visit):
    with visit("result") as seen:
        paper = seen.page.pdf(format="A4")
    assert paper.startswith(b"%PDF")
    assert paper.count(b"/Type /Page\n") + paper.count(b"/Type /Page ") >= 1


def test_without_colour_each_series_is_told_by_its_shape_and_its_letter(visit):
    with visit("result", viewport=DESK) as seen:
        dashes = seen.page.evaluate(
            "[...document.querySelectorAll('path.line')].map(p => getComputedStyle(p).strokeDasharray)"
        )
        texts = seen.page.locator("svg text").all_text_contents()
    assert len(dashes) >= 2
    assert len(set(dashes)) == len(dashes)
    assert {"A", "B", "C"} <= set(texts)
