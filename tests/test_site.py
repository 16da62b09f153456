"""The built site in a real browser: complete without a network, quiet, readable on a phone, described in words.

`make test` builds the site first. Without Chromium these tests are skipped, unless CI is set: then that is a failure.
"""

import os
import re
from pathlib import Path

import pytest
import yaml
from browser import MISSING, SITE, chromium, executable, open_page, pages

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["repository"]
PAGES = pages() or [SITE / "not-built.html"]


@pytest.fixture(scope="module")
def context():
    if executable() is None:
        if os.environ.get("CI"):
            pytest.fail(MISSING)
        pytest.skip(MISSING)
    with chromium() as browser:
        yield browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_page(context, path):
    page, seen = open_page(context, path)
    assert seen.outside == [] and seen.failed == [] and seen.console == []

    pictures = page.eval_on_selector_all("img", "all => all.map(i => [i.getAttribute('src'), i.alt, i.naturalWidth])")
    for source, alt, width in pictures:
        assert alt and alt.strip(), f"no alt text: {source[:80]}"
        assert width > 0, f"not loaded: {source[:80]}"

    formulas, set_ = page.evaluate("[document.querySelectorAll('.math').length, "
                                   "document.querySelectorAll('.math mjx-container').length]")
    assert set_ >= formulas, f"{formulas} formulas, {set_} set"
    assert page.locator("mjx-merror").count() == 0

    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.documentElement.dataset.theme == 'dark'", timeout=5_000)
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        page.wait_for_timeout(50)
        inner, wide = page.evaluate("[document.documentElement.clientWidth, document.documentElement.scrollWidth]")
        assert wide <= inner, f"scrolls sideways at {width}: {wide} > {inner}"
    page.close()


@pytest.mark.parametrize("path", [p for p in PAGES if p.parent.name == "notebooks"], ids=lambda p: p.stem)
def test_launch_and_download_buttons(path):
    html = path.read_text(encoding="utf-8")
    notebook = f"notebooks/{path.stem}.ipynb"
    assert (ROOT / notebook).is_file()
    owner = REPOSITORY["url"].removeprefix("https://github.com/")
    assert f'href="https://colab.research.google.com/github/{owner}/blob/{REPOSITORY["branch"]}/{notebook}"' in html
    download = re.search(r'href="(\.\./_sources/[^"]+\.ipynb)"', html)
    assert download and (path.parent / download[1]).resolve().is_file()


def test_the_front_page_leads_to_the_preface(context):
    page = context.new_page()
    page.goto((SITE / "index.html").as_uri())
    page.wait_for_url("**/book/intro.html")
    assert page.locator("h1").first.inner_text().startswith("Adversarial examples and robustness certificates")


def test_search_works_from_a_folder_of_files(context):
    page = context.new_page()
    page.goto((SITE / "search.html").as_uri() + "?q=bracket")
    page.wait_for_selector("#search-results li a", timeout=10_000)
