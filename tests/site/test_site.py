"""The built site as people see it: every page in a browser, on a phone and on a desk, in light and in dark.

    sphinx-build docs docs/_build/html
    JAXWEIGHTS_SITE=docs/_build/html python -m pytest -n 0 tests/site

needs Chromium on the PATH, and Playwright. Playwright brings no browser.
"""

import functools
import http.server
import os
import re
import shutil
import threading
from collections import Counter
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

SITE = os.environ.get("JAXWEIGHTS_SITE")
if SITE is None:
    pytest.skip("JAXWEIGHTS_SITE names no built site", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api")

SITE = Path(SITE).resolve()
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
VIEWS = {"phone": (390, "dark"), "desk": (1280, "light")}
"""The width of the window, and the colours that the reader prefers."""
TECHNIQUES = {
    "weight normalization": "weight_norm",
    "spectral norm": "spectral_norm",
    "batch norm": "batch_norm",
    "layer norm": "layer_norm",
    "weight decay": "weight_decay",
    "weight clipping": "weight_clipping",
    "weight sharing": "weight_sharing",
    "initialization": "initialization",
    "quantization": "quantization",
    "sparsification": "sparsification",
    "pruning": "sparsification",
}
"""What people type, and the page that they look for."""
LOOK = (Path(__file__).parent / "look.js").read_text()
RAW = re.compile(r"\$\$|\\[a-zA-Z]{2,}|`|\]\(|\{(?:doc|ref|math|func)\}|:\w+:`|<!--|\*\*\w[^*]*\*\*")
"""What a reader sees of markup that was not understood."""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    """Of a server of the site on this machine: the search does not work in files."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert executable, "there is no chromium on the PATH"
    with sync_api.sync_playwright() as playwright:
        # Chromium refuses to run as root in its sandbox; containers have little shared memory.
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def complaints():
    """Everything that the browser complained of, with the page."""
    return []


@pytest.fixture(scope="module")
def tab(browser, address, complaints):
    context = browser.new_context()
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
    tab = context.new_page()
    tab.set_default_timeout(120_000)

    def complain(text):
        complaints.append(f"{tab.url.removeprefix(address)}: {text}")

    tab.on("console", lambda m: complain(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: complain(f"error: {error}"))
    tab.on("requestfailed", lambda request: complain(f"failed: {request.url}"))
    tab.on("response", lambda r: complain(f"status {r.status}: {r.url}") if r.status >= 400 else None)
    tab.on("request", lambda r: complain(f"fetched {r.url}") if _elsewhere(r.url, address) else None)
    return tab


def show_on(view, tab):
    """Makes the window that of a phone or a desk."""
    width, scheme = VIEWS[view]
    tab.set_viewport_size({"width": width, "height": 844})
    tab.emulate_media(color_scheme=scheme)


def _elsewhere(url, address):
    return not url.startswith((address, "data:", "blob:"))


@pytest.fixture(scope="module")
def seen(tab, address):
    """{(page, view): what `look.js` finds there}. A page is opened in one view, and then changed to the other."""
    found = {}
    views = list(VIEWS)
    for page in PAGES:
        tab.goto(f"{address}/{page}")
        for view in views:
            show_on(view, tab)
            found[page, view] = tab.evaluate(LOOK)
        views.reverse()  # the next page is opened in the view that this one was left in
    return found


def expect_none(faults):
    """Fails with all of them, a line each."""
    if lines := sorted(set(faults)):
        pytest.fail("\n".join(lines), pytrace=False)


def listed(seen, kind):
    """What is listed under `kind`, with page and view."""
    return [f"{page}, {view}: {fault}" for (page, view), found in seen.items() for fault in found[kind]]


def test_every_page_has_one_heading_and_a_title_of_its_own(seen):
    titles = Counter(found["title"] for (_, view), found in seen.items() if view == "desk")
    expect_none(title for title, count in titles.items() if count > 1)
    headings = {page: found["headings"] for (page, _), found in seen.items() if page != "search.html"}  # of a script
    expect_none(f"{page} has {count} main headings" for page, count in headings.items() if count != 1)


def test_the_browser_does_not_complain_and_fetches_nothing_from_elsewhere(seen, complaints):
    expect_none(complaints)


def test_links_lead_somewhere(seen, address):
    places = {f"/{page}": set(found["ids"]) for (page, _), found in seen.items()}
    broken = set()
    for (page, _), found in seen.items():
        for link in found["links"]:
            if not link.startswith(address):
                broken |= set() if link.startswith("https://") else {f"{page}: {link}"}
                continue
            url = urlsplit(link)
            path = url.path + "index.html" * url.path.endswith("/")
            if not (SITE / unquote(path[1:])).is_file() or (url.fragment and unquote(url.fragment) not in places[path]):
                broken.add(f"{page}: {link.removeprefix(address)}")
    expect_none(broken)
    assert sum(len(found["links"]) for found in seen.values()) > 1000


def test_pictures_load_and_are_described(seen):
    expect_none(listed(seen, "pictures"))
    assert sum(found["pictures_seen"] for found in seen.values()) >= 2 * len(TECHNIQUES)


def test_formulas_are_typeset(seen):
    expect_none(listed(seen, "formulas"))
    without = [name for name in TECHNIQUES.values() if not seen[f"techniques/{name}.html", "desk"]["formulas_seen"]]
    assert without == []


def test_no_markup_is_left(seen):
    raw = {f"{page}: {text}" for (page, _), found in seen.items() for text in found["prose"] if RAW.search(text)}
    expect_none(raw)


def test_pages_are_no_wider_than_the_window(seen):
    expect_none(listed(seen, "too_wide"))


def test_text_can_be_read_on_its_background(seen):
    expect_none(listed(seen, "faint"))


def test_code_has_a_button_that_copies_it(seen):
    expect_none(listed(seen, "without_button"))


@pytest.mark.parametrize("page", ["levels.html", "reference/spectral_norm.html"], ids=["plain", "prompts"])
def test_a_button_copies_the_code_alone(tab, address, page):
    show_on("desk", tab)
    tab.goto(f"{address}/{page}")
    blocks = tab.locator("div.highlight:has(button.copybtn)").all()
    assert len(blocks) > 3
    for block in blocks:
        lines = block.locator("pre").inner_text().splitlines()
        if any(line.startswith(">>> ") for line in lines):  # the input without prompts, and no output
            lines = [line[4:] for line in lines if line.startswith((">>> ", "... "))]
        block.hover()
        block.locator("button.copybtn").click()
        assert tab.evaluate("navigator.clipboard.readText()").strip() == "\n".join(lines).strip()


@pytest.mark.parametrize("typed", TECHNIQUES)
def test_the_search_finds_the_techniques(tab, address, typed):
    show_on("desk", tab)
    tab.goto(f"{address}/index.html")
    tab.locator(".sidebar-search").fill(typed)
    tab.locator(".sidebar-search").press("Enter")
    tab.wait_for_selector("ul.search li:nth-child(3)")
    first = tab.eval_on_selector_all("ul.search li > a", "links => links.slice(0, 3).map(a => a.pathname)")
    assert f"/techniques/{TECHNIQUES[typed]}.html" in first


def test_a_phone_reaches_every_chapter_by_the_menu(tab, address):
    show_on("phone", tab)
    tab.goto(f"{address}/levels.html")
    link = tab.locator(".sidebar-tree a", has_text=re.compile("^Choosing"))
    assert not link.is_visible() or link.bounding_box()["x"] < 0
    tab.locator(".mobile-header label[for=__navigation]").click()
    link.click()
    assert urlsplit(tab.url).path == "/choosing.html"
