"""The page of a run in a real browser: sorted, searched and opened by keys, with no error and no request."""

from __future__ import annotations

import shutil

import pytest

api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium to open the page with")


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=["toy_page", "language_page"])
def shown(request, browser):
    """The page, what is in it, and what went wrong or was asked for."""
    _, page, path = request.getfixturevalue(request.param)
    tab, wrong = browser.new_page(viewport={"width": 1000, "height": 800}), []
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("request", lambda asked: wrong.append(asked.url) if not asked.url.startswith(("data:", "file:")) else None)
    tab.goto(path.as_uri())
    yield tab, page
    assert wrong == []
    tab.close()


def addresses(tab):
    return [row.locator("button").inner_text() for row in tab.locator("tr.slice:visible").all()]


def test_columns_are_sorted(shown):
    tab, page = shown
    assert addresses(tab) == [one.address for one in page.slices]
    head = tab.locator("#slice-table thead button", has_text="positions")
    head.press("Enter")
    assert head.locator("xpath=..").get_attribute("aria-sort") == "descending"
    wanted = sorted((one.positions for one in page.slices), reverse=True)
    assert [int(row.locator("td").nth(1).inner_text()) for row in tab.locator("tr.slice").all()] == wanted
    head.press("Enter")
    assert head.locator("xpath=..").get_attribute("aria-sort") == "ascending"
    assert [int(row.locator("td").nth(1).inner_text()) for row in tab.locator("tr.slice").all()] == wanted[::-1]
    assert tab.locator("[aria-sort]").count() == 1


def test_slices_are_searched_and_opened(shown):
    tab, page = shown
    first = page.slices[0]
    places = tab.locator("tr.places").first
    assert not places.is_visible()
    opener = tab.locator("tr.slice button").first
    opener.press("Space")
    assert opener.get_attribute("aria-expanded") == "true"
    assert places.is_visible()
    assert places.locator("li").count() == len(first.places)
    assert places.locator("mark").first.inner_text().strip() == first.places[0].token.strip()
    last = page.slices[-1].address
    tab.locator("#search").fill(last.upper())
    found = [one.address for one in page.slices if one.address.startswith(last)]
    assert addresses(tab) == found
    assert tab.locator("#count").inner_text() == f"{len(found)} of {len(page.slices)} slices"
    tab.locator("#search").fill("no such thing")
    assert addresses(tab) == []
    assert not places.is_visible()
    tab.locator("#search").fill("")
    assert addresses(tab) == [one.address for one in page.slices]
    assert places.is_visible()


def test_colours_follow_the_reader_and_all_is_seen(shown):
    tab, _ = shown
    ground = {}
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        ground[scheme] = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        wide = tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert wide, "tables scroll by themselves"
    assert ground["light"] != ground["dark"]
    assert tab.evaluate("[...document.images].every((one) => one.complete && one.naturalWidth > 0)")
    tab.emulate_media(media="print")
    assert not tab.locator("#search").is_visible()
