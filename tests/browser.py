"""A headless Chromium for the tests of the built site, cut off from the network.

    python tests/browser.py                    say whether the browser tests can run here
    python tests/browser.py shots FOLDER       pictures of every page: 1280 light, 1280 dark, 390 dark
"""

import os
import shutil
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SITE = Path(__file__).resolve().parent.parent / "_build" / "html"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
MISSING = ("SKIPPED: the browser tests of the built site (tests/test_site.py), because no Chromium was found. "
           "Install it (apt install chromium) or name it in CHROMIUM; everything else ran.")


def executable() -> str | None:
    """Path of a Chromium, from the variable CHROMIUM or the usual names."""
    return os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Complaints:
    """What went wrong while a page was open."""
    outside: list[str] = field(default_factory=list)  # requests to another host
    failed: list[str] = field(default_factory=list)   # files of the site that are not there
    console: list[str] = field(default_factory=list)  # console errors and exceptions


@contextmanager
def chromium():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=FLAGS)
        yield browser
        browser.close()


def open_page(context, path: Path):
    """Open a file of the site; -> the page, when its formulas are set, and what went wrong."""
    page, seen = context.new_page(), Complaints()

    def outside(route):
        seen.outside.append(route.request.url)
        route.abort()

    page.route(lambda url: not url.startswith(("file:", "data:", "blob:")), outside)
    page.on("requestfailed", lambda r: seen.failed.append(r.url) if r.url.startswith("file:") else None)
    page.on("console", lambda m: seen.console.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: seen.console.append(str(e)))
    page.goto(path.as_uri(), wait_until="load")
    page.evaluate("() => window.MathJax && MathJax.startup && MathJax.startup.promise")
    return page, seen


def shots(folder: Path, only: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for name, width, scheme in (("light", 1280, "light"), ("dark", 1280, "dark"), ("phone", 390, "dark")):
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            for path in pages():
                if not only or any(word in path.name for word in only):
                    page, _ = open_page(context, path)
                    page.wait_for_timeout(500)  # the theme's side bar slides in
                    page.screenshot(path=folder / f"{path.stem}-{name}.png", full_page=True)
                    page.close()


def pages() -> list[Path]:
    """Every page a reader can reach."""
    return sorted(p for folder in ("book", "notebooks") for p in (SITE / folder).glob("*.html"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["shots"]:
        shots(Path(sys.argv[2]), sys.argv[3:])
    elif executable() is None:
        print(MISSING)
