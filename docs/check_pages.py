"""Look at every page of the site in a browser, as wide as a desktop and as a phone.

    make docs && pip install playwright
    python docs/check_pages.py --browser /usr/bin/chromium --out out/pages

Nothing may be wider than the window (what is, has to scroll in its own box), all
pictures and formulas have to be there, and nothing may come from another host or fail.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from playwright.sync_api import Page, sync_playwright

SITE = Path(__file__).parents[1] / "build" / "site"
WINDOWS = {"desktop": (1280, 900), "phone": (390, 844)}
QUIET = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# What a page is, once its formulas are set.
LOOK = """async (width) => {
  if (window.MathJax?.startup) await MathJax.startup.promise;
  const wide = document.documentElement.scrollWidth;
  const scrolls = (e) => e && (
    ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX)
    || getComputedStyle(e).position === "fixed" || scrolls(e.parentElement));
  const outside = [...document.body.querySelectorAll("*")].filter((e) =>
    e.getBoundingClientRect().right > width + 1 && !scrolls(e));
  const images = [...document.images];
  images.forEach((image) => { image.loading = "eager"; });
  await Promise.all(images.map((image) => image.decode().catch(() => null)));
  return {
    wide: wide > width ? [`${wide} > ${width}`] : [],
    outside: outside.slice(0, 3).map((e) => `${e.tagName}.${e.className}`),
    missing: images.filter((i) => !i.naturalWidth).map((i) => i.src),
    formulas: document.querySelectorAll("div.math, span.math").length,
    set: document.querySelectorAll("mjx-container").length,
    wrong: [...document.querySelectorAll("mjx-merror")].map((e) => e.textContent),
  };
}"""


class Quiet(SimpleHTTPRequestHandler):
    """Serves files without a log."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


def faults(page: Page, address: str) -> Iterator[str]:
    """What is wrong with one page in the window that is open."""
    failed: list[str] = []
    page.on("requestfailed", lambda request: failed.append(request.url))
    page.on("response", lambda r: r.status >= 400 and failed.append(r.url))
    page.on("request", lambda r: address[:18] in r.url or failed.append(r.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(address, wait_until="load")
    found = page.evaluate(LOOK, page.viewport_size["width"])
    yield from failed
    for fault in ("wide", "outside", "missing", "wrong"):
        yield from (f"{fault}: {x}" for x in found[fault])
    if found["set"] < found["formulas"]:
        yield f"{found['set']} of {found['formulas']} formulas are set"


def main() -> int:
    """Print what is wrong, page by page; the number of pages with faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--browser", help="Chromium's path; Playwright's own if none")
    parser.add_argument("--out", type=Path, help="a folder for pictures of the pages")
    args = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    Thread(target=server.serve_forever, daemon=True).start()
    files = [f.relative_to(SITE) for f in SITE.rglob("*.html")]
    names = sorted(str(f) for f in files if f.parts[0] != "_static")
    bad = 0
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=args.browser, args=QUIET)
        for window, (width, height) in WINDOWS.items():
            for name in names:
                view = {"width": width, "height": height}
                page = browser.new_page(viewport=view, is_mobile=window == "phone")
                found = list(
                    faults(page, f"http://127.0.0.1:{server.server_port}/{name}")
                )
                print(f"{window} {name}: {'; '.join(found) or 'good'}")
                bad += bool(found)
                if args.out:
                    picture = (
                        f"{name.removesuffix('.html').replace('/', '-')}-{window}.png"
                    )
                    page.screenshot(path=args.out / picture)
                page.close()
        browser.close()
    print(f"{2 * len(names)} looks at {len(names)} pages, {bad} with faults")
    return bad


if __name__ == "__main__":
    sys.exit(min(main(), 1))
