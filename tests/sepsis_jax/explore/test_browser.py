"""The pages in Chromium: choosing, plans, keyboard alone, axe-core, sizes and themes.

They need Chromium and the extra `browser`; without either they are skipped, and say so.
"""

import json
import re
import shutil
import threading
import time
from importlib.util import find_spec
from urllib.parse import parse_qs, urlsplit

import pytest

from sepsis_jax.explore.explorer import Explorer
from sepsis_jax.explore.server import bound_socket, create_app
from tests.sepsis_jax.explore.conftest import KEY, PATIENT

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MISSING = [name for name in ("playwright", "axe_playwright_python") if find_spec(name) is None]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.skipif(bool(MISSING), reason=f"needs the extra `browser`: {MISSING}"),
]
WAIT = 20_000  # ms
# Plotly brings rules of its maps, which the policy of content keeps out, as it should.
EXPECTED = "violates the following Content Security Policy directive 'style-src 'self''"


@pytest.fixture(scope="module")
def site(explorer):
    """The address of a running server."""
    import uvicorn

    listening = bound_socket(0)
    port = listening.getsockname()[1]
    app = create_app(explorer, KEY, port=port)
    server = uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A tab of the browser that has shown the key; keeps what it asked for and complained of."""

    def __init__(self, chromium, site, **options):
        self.site = site
        self.context = chromium.new_context(
            **{"viewport": {"width": 1280, "height": 900}} | options
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.asked, self.complaints = [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._heard)
        self.open(f"/?split=all&key={KEY}")

    def _heard(self, message):
        if message.type in ("error", "warning") and EXPECTED not in message.text:
            self.complaints.append(message.text)

    def open(self, path):
        self.page.goto(self.site + path)
        self.drawn()

    def drawn(self):
        """Waits until every chart shows what the page says."""
        self.wait(
            "document.body.dataset.drawn === location.href && ["
            "...document.querySelectorAll('.plot')].every("
            "plot => plot.dataset.drawn === plot.nextElementSibling.textContent)"
        )

    def wait(self, condition):
        """Asks again and again; the browser's own way needs `eval`, which the page forbids."""
        end = time.monotonic() + WAIT / 1000
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, condition
            self.page.wait_for_timeout(20)

    def asks(self):
        """What the address asks for."""
        return {name: values for name, values in parse_qs(urlsplit(self.page.url).query).items()}

    def until(self, **wanted):
        """Waits until the address says so, and the charts are drawn."""
        for name, value in wanted.items():
            pattern = re.compile(rf"[?&]{name}={re.escape(str(value))}(&|$)")
            self.page.wait_for_url(pattern, wait_until="commit")
        self.drawn()

    def curve(self, chart, trace):
        """Heights of a line that is drawn, from the browser's own copy."""
        return self.page.evaluate(
            "([name, start]) => document.getElementById(name).data.find("
            "one => (one.hovertemplate || '').startsWith(start)).y",
            [f"plot-{chart}", trace],
        )

    def focused(self):
        return self.page.evaluate("document.activeElement.id || document.activeElement.textContent")


@pytest.fixture
def tab(chromium, site):
    found = Tab(chromium, site)
    yield found
    found.context.close()
    assert not found.complaints
    assert {urlsplit(url).netloc for url in found.asked} <= {urlsplit(site).netloc, ""}


@pytest.fixture(scope="module")
def stay(explorer: Explorer):
    return next(one for one, row in explorer.rows.items() if explorer.length[row] >= 9)


def test_a_patient_is_chosen_a_plan_changed_and_the_charts_follow(tab, explorer):
    page = tab.page
    first = page.locator("tbody a").first
    chosen = first.inner_text()
    first.click()
    page.wait_for_url(re.compile(r"/patient\?stay="))
    tab.drawn()
    assert page.locator("h1").inner_text() == f"Patient {chosen}, hour 0"
    assert page.locator(".plot .main-svg").count() >= 19
    before = tab.curve("fan-meanbp", "A, hour")
    same = page.evaluate_handle("document.getElementById('plot-history-lactate').firstElementChild")
    page.locator("#cell-23").click()
    tab.until(plan="4,3")
    after = tab.curve("fan-meanbp", "A, hour")
    assert before[0] == after[0] and before != after
    table = explorer.futures(_address(page.url, explorer)).table
    rows = table[(table["feature"] == "meanbp") & (table["plan"] == "chosen")]
    assert after == pytest.approx(rows["q50"].tolist(), abs=2e-3)
    assert page.locator('[aria-selected="true"] a').get_attribute("data-cell") == "23"
    assert "Plan A, vasopressor very high, fluid high" in page.locator("#live").inner_text()
    # What did not change is not drawn anew.
    assert page.evaluate(
        "one => one === document.getElementById('plot-history-lactate').firstElementChild", same
    )
    page.go_back()
    tab.wait("!location.search.includes('plan=')")
    tab.drawn()
    assert tab.curve("fan-meanbp", "A, hour") == before


def _address(url, explorer):
    from sepsis_jax.explore.address import read_patient_address

    query = parse_qs(urlsplit(url).query, keep_blank_values=True)
    return read_patient_address(query, horizon=explorer.horizon)


def test_a_plan_is_set_step_by_step_kept_and_compared(tab, stay):
    page = tab.page
    tab.open(f"/patient?stay={stay}&step=1")
    page.locator("#edit-2").click()
    tab.until(edit=1)
    page.locator("#cell-12").click()
    tab.until(plan="0,0;2,2;0,0")
    page.locator("#keep").click()
    tab.until(**{"with": "0,0;2,2;0,0"})
    page.locator("#edit-0").click()
    tab.until(edit="all")
    page.locator("#cell-1").click()
    tab.until(plan="0,1")
    assert page.locator(".legend li").count() == 3
    assert tab.curve("fan-sofa", "C, hour") != tab.curve("fan-sofa", "A, hour")
    page.locator("#remove-B").click()
    tab.wait("!location.search.includes('clinician')")
    tab.drawn()
    assert tab.asks()["with"] == ["0,0;2,2;0,0"]
    page.locator("#truth").click()
    tab.until(truth=0)
    assert "Diamonds" not in page.locator("main").inner_text()


def test_a_click_on_the_history_chooses_the_hour(tab, stay):
    page = tab.page
    tab.open(f"/patient?stay={stay}&step=0")
    place = page.evaluate(
        "() => { const plot = document.getElementById('plot-history-meanbp');"
        " plot.scrollIntoView({block: 'center'}); const axis = plot._fullLayout.xaxis;"
        " const box = plot.getBoundingClientRect();"
        " return [box.left + axis._offset + axis.d2p(12.9), box.top + 60]; }"
    )
    page.mouse.click(*place)
    tab.until(step=3)
    assert page.locator("h1").inner_text().endswith("hour 12")


def test_everything_is_reached_by_the_keyboard_alone(tab, stay):
    page = tab.page
    press = page.keyboard.press

    def tab_to(name, key="Tab"):
        for _ in range(150):
            press(key)
            if tab.focused() == name:
                return
        raise AssertionError(f"{name} is not reached")

    press("Tab")
    assert tab.focused() == "Skip to the content"
    press("Enter")
    tab_to("stay")
    page.keyboard.type(str(stay))
    press("Enter")
    page.wait_for_url(re.compile(rf"/patient\?stay={stay}"))
    tab.drawn()
    tab_to("step")
    press("ArrowRight")
    tab.until(step=1)
    assert tab.focused() == "step"
    tab_to("cell-0")
    for key, cell in (("ArrowDown", 5), ("ArrowRight", 6), ("End", 9), ("ArrowRight", 9),
                      ("PageDown", 24), ("Home", 20), ("ArrowUp", 15),
                      ("ArrowUp", 10)):  # fmt: skip
        press(key)
        assert tab.focused() == f"cell-{cell}"
    ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid"
    press("Enter")
    tab.until(plan="2,0")
    assert tab.focused() == "cell-10"
    press("ArrowRight")
    press(" ")
    tab.until(plan="2,1")
    press("Tab")
    assert tab.focused() == "grid-mortality"  # the grid is one stop
    tab_to("Python for this page", "Shift+Tab")
    press("Enter")
    assert page.locator("dialog[open] pre").is_visible()
    press("Escape")
    assert page.locator("dialog[open]").count() == 0
    assert tab.focused() == "Python for this page"
    tab_to("theme", "Shift+Tab")
    press("Enter")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    tab_to("policy-2")
    press("Enter")
    tab.wait("!location.search.includes('plan=2,1')")


def test_a_shared_address_shows_the_same_page(chromium, site, tab, stay):
    tab.open(f"/patient?stay={stay}&step=2")
    tab.page.locator("#grid-reward").click()
    tab.until(grid="reward")
    tab.page.locator("#cell-7").click()
    tab.until(plan="1,2")
    other = Tab(chromium, site)
    try:
        other.open(tab.page.url.removeprefix(site))
        for part in ("#grid", "#outcome-numbers", ".legend", "#code-text"):
            assert other.page.locator(part).text_content() == tab.page.locator(part).text_content()
    finally:
        other.context.close()


def test_the_dialogue_is_read_step_by_step(tab):
    page = tab.page
    tab.open(f"/patient?stay={PATIENT}&step=1")
    page.get_by_role("link", name="Dialogue of the run").click()
    page.wait_for_url(re.compile(r"/dialogue\?"))
    assert "The chart at hour 4." in page.locator(".messages").inner_text()
    page.locator("#decision-before").click()
    tab.until(decision=0)
    assert "What the simulator says." in page.locator(".messages").inner_text()
    assert "The chart at hour 4." not in page.locator(".messages").inner_text()


def test_the_theme_is_followed_and_kept(chromium, site, stay):
    tab = Tab(chromium, site, color_scheme="dark")
    try:
        tab.open(f"/patient?stay={stay}&step=1")
        ground = "getComputedStyle(document.body).backgroundColor"
        ink = "document.getElementById('plot-history-lactate').layout.font.color"
        assert tab.page.evaluate(ground) == "rgb(18, 22, 27)"
        assert tab.page.evaluate(ink) == "#e6edf3"
        tab.page.locator("#theme").click()
        tab.drawn()
        assert tab.page.evaluate(ground) == "rgb(255, 255, 255)"
        assert tab.page.evaluate(ink) == "#1b1f24"
        tab.page.reload()
        tab.drawn()
        assert tab.page.evaluate(ground) == "rgb(255, 255, 255)"
    finally:
        tab.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280, 1920])
def test_pages_fit_and_axe_finds_nothing(width, scheme, chromium, site, stay):
    from axe_playwright_python.sync_playwright import Axe

    tab = Tab(chromium, site, viewport={"width": width, "height": 900}, color_scheme=scheme)
    try:
        for path in (
            "/?split=all",
            f"/patient?stay={stay}&step=2&plan=4,0;1,1&edit=1&with=clinician&with=0,0",
            f"/dialogue?run=run&patient={PATIENT}&decision=0", "/patient?stay=x",
        ):  # fmt: skip
            tab.open(path)
            assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
            tab.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            # The policy of content keeps out scripts in the page; this is how tools bring theirs.
            found = Axe().run(tab.page).response["violations"]
            assert not found, json.dumps(
                [(one["id"], [node["html"][:150] for node in one["nodes"]]) for one in found]
            )
    finally:
        tab.context.close()
    refused = [one for one in tab.complaints if "400 (Bad Request)" not in one]
    assert not refused
