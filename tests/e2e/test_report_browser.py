"""The report in a real browser: it opens alone, runs nothing foreign, and keeps content veiled until asked."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import factories as make
from safeweights.report.page import write_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium found on the path")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def report(tmp_path: Path) -> Path:
    make.fill_all(tmp_path)
    return write_report(tmp_path)


@pytest.fixture(params=["light", "dark"])
def page(browser: Any, report: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    context = browser.new_context(color_scheme=request.param, viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.said, opened.asked = [], []
    opened.on("console", lambda message: opened.said.append(message.text))
    opened.on("pageerror", lambda error: opened.said.append(str(error)))
    opened.on("request", lambda asked: opened.asked.append(asked.url))
    opened.goto(report.as_uri())
    yield opened
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [report.as_uri()]
    context.close()


def blurred(page: Any, place: int) -> bool:
    return "blur" in page.locator("button.veil img").nth(place).evaluate("image => getComputedStyle(image).filter")


def test_it_opens_alone_and_hostile_prompts_are_text(page: Any, tmp_path: Path) -> None:
    assert page.title() == "Release audit: 2 of 4 come back under attack. 1 holds. 1 is not settled."
    assert page.get_by_text(make.HOSTILE[0]).first.is_visible()
    assert page.get_by_text("{{ 7 * 7 }}").first.is_visible()
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    shot = tmp_path / "report.png"
    page.screenshot(path=str(shot), full_page=True)
    assert shot.stat().st_size > 50_000


def test_content_is_veiled_until_clicked_or_pressed(page: Any) -> None:
    veils = page.locator("button.veil")
    assert all(blurred(page, place) for place in range(veils.count()))
    assert veils.count() >= 12
    for act in (lambda: veils.nth(0).click(), lambda: veils.nth(1).press("Enter")):
        act()
    page.wait_for_timeout(400)
    assert [blurred(page, place) for place in range(3)] == [False, False, True]
    veils.nth(0).press("Space")
    page.locator("button.unveil").click()
    page.wait_for_timeout(400)
    assert not any(blurred(page, place) for place in range(veils.count()))


def test_a_telephone_scrolls_down_only(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    heights = page.evaluate("[...document.querySelectorAll('.score strong')].map(e => e.getBoundingClientRect().height)")
    assert max(heights) == min(heights), "figure and unit together"


def test_every_setting_is_there_when_opened(page: Any) -> None:
    page.locator("#filter").focus()
    page.wait_for_selector(".list details")
    page.evaluate("document.querySelectorAll('details').forEach(entry => { entry.open = true; })")
    page.wait_for_selector(".list .facts")
    assert page.get_by_text("model_sha256").first.is_visible()
    assert page.get_by_text("parameters", exact=True).first.is_visible()


def test_the_slider_moves_through_the_checkpoints(page: Any) -> None:
    slider = page.get_by_role("slider", name="Steps")
    film = page.locator(".film")
    assert film.locator("output").inner_text() == "after 400 steps"
    slider.focus()
    page.keyboard.press("Home")
    assert film.locator("output").inner_text() == "before the attack"
    assert slider.get_attribute("aria-valuetext") == "before the attack"
    assert [film.locator(".frame").nth(i).is_visible() for i in range(5)] == [True, False, False, False, False]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert film.locator("output").inner_text() == "after 22 steps"
    assert [film.locator(".frame").nth(i).is_visible() for i in range(5)] == [False, False, True, False, False]
    assert film.locator(".frame img:visible").count() == 8


def test_the_list_of_records_is_searched_and_opened_by_keyboard(page: Any) -> None:
    page.locator("#filter").focus()
    page.wait_for_selector(".list details")
    assert page.locator("#found").inner_text() == "19 of 19 records"
    page.keyboard.type("UCE  relearn")
    assert page.locator("#found").inner_text() == "0 of 19 records"
    page.locator("#filter").fill("uce re-learning")
    assert page.locator("#found").inner_text() == "1 of 19 records"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector(".list .facts")
    assert page.locator(".list .facts").get_by_text("steps_to_recovery").count() == 0
    assert page.locator(".list .facts").get_by_text("model_sha256").is_visible()
    page.locator(".to-records a").first.click()
    assert "mosaic" in page.locator("#filter").input_value()
    assert page.locator(".list .outcome.failed").count() == 0


def test_the_keyboard_reaches_everything(page: Any) -> None:
    """Tab goes from the skip link through every control, in the order of the page, and each shows where it is."""
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    places, hidden = [], 0
    for _ in range(90):
        page.keyboard.press("Tab")
        told = page.evaluate("""() => { const e = document.activeElement, box = e.getBoundingClientRect();
          return [e.tagName, e.className, box.top + scrollY, getComputedStyle(e).outlineStyle !== "none"]; }""")
        if told[0] == "BODY":
            break
        places.append(told)
        hidden += not told[3]
    assert hidden == 0
    assert {"A", "SUMMARY", "BUTTON", "INPUT", "DIV"} <= {tag for tag, *_ in places}


def test_plots_are_pictures_with_words(page: Any) -> None:
    plots = page.locator("svg.drawing")
    assert plots.count() == 6
    for place in range(plots.count()):
        ids = plots.nth(place).get_attribute("aria-labelledby").split()
        assert all(page.locator(f"#{ident}").inner_html() for ident in ids)
    assert page.get_by_role("img", name="Frozen share of each layer").count() == 1
    page.locator(".figure summary").first.click()
    assert page.locator(".figure .figures").first.is_visible()


def test_long_drawings_stay_in_the_page(page: Any) -> None:
    page.evaluate("document.querySelectorAll('.concept').forEach(part => part.scrollIntoView())")
    outside = page.evaluate("""() => [...document.querySelectorAll('svg.drawing text')].filter(text => {
      const box = text.getBoundingClientRect(), frame = text.closest('svg').getBoundingClientRect();
      return box.left < frame.left - 6 || box.right > frame.right + 6; }).map(text => text.textContent)""")
    assert outside == []


def test_no_name_leaves_its_plot(page: Any) -> None:
    beyond = page.evaluate(
        """[...document.querySelectorAll('svg text')].filter(text => text.getBoundingClientRect().width > 0 &&
        text.getBoundingClientRect().right > text.ownerSVGElement.getBoundingClientRect().right + 1)
        .map(text => text.textContent)"""
    )
    assert beyond == []


def test_text_is_legible(page: Any) -> None:
    """WCAG AA: a contrast of 4.5 between every text and what lies behind it."""
    worst = page.evaluate("""() => {
      const rgb = text => { const v = text.match(/[\\d.]+/g).map(Number); return {c: v.slice(0, 3), a: v[3] ?? 1}; };
      const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
      const light = c => { const [r, g, b] = c.map(v => linear(v / 255));
        return .2126 * r + .7152 * g + .0722 * b; };
      const found = [];
      const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) {
        const element = walker.currentNode.parentElement;
        if (!walker.currentNode.textContent.trim() || element.closest("script, [aria-hidden=true], svg")) continue;
        let behind = element;
        while (behind && rgb(getComputedStyle(behind).backgroundColor).a === 0) behind = behind.parentElement;
        const a = light(rgb(getComputedStyle(element).color).c);
        const b = light(rgb(getComputedStyle(behind ?? document.body).backgroundColor).c);
        found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), walker.currentNode.textContent.trim().slice(0, 40)]);
      }
      return found.sort((a, b) => a[0] - b[0])[0];
    }""")
    assert worst[0] >= 4.5, worst


def test_it_prints(page: Any, tmp_path: Path) -> None:
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator(".film .frame").first.is_visible()
    assert not page.locator(".film .control").is_visible()
    page.pdf(path=str(tmp_path / "report.pdf"), format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_leaderboard_can_be_sorted(browser: Any, tmp_path: Path, scheme: str) -> None:
    from safeweights.bench.leaderboard import leaderboard_page

    records = make.fill_all(tmp_path).records()
    methods, concepts, attacks = ["uce", "esd"], ["mosaic", "warning emblem"], ["random", "unlearndiffatk", "relearn"]
    text = leaderboard_page(records, methods=methods, concepts=concepts, attacks=attacks, total=30)
    (tmp_path / "leaderboard.html").write_text(text)
    page = browser.new_page(color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((tmp_path / "leaderboard.html").as_uri())
    table = page.locator("table.sortable").first

    def order() -> list[str]:
        return table.locator("tbody th").all_inner_texts()

    assert order() == ["esd", "uce"]
    heading = table.get_by_role("columnheader", name="strongest attack")
    heading.get_by_role("button").click()
    assert (heading.get_attribute("aria-sort"), order()) == ("ascending", ["esd", "uce"])
    heading.get_by_role("button").press("Enter")
    assert (heading.get_attribute("aria-sort"), order()) == ("descending", ["uce", "esd"])
    page.screenshot(path=str(tmp_path / "leaderboard.png"), full_page=True)
    assert said == []
    page.close()
