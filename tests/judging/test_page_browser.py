"""The page in a real Chromium that is offline: what a user sees, hears and can reach by keyboard.

`apt-get install chromium` and `pip install -e .[browser]` make these run.
"""

import shutil
from dataclasses import dataclass, field

import pytest

from recipe.judging.page import page as page_of
from tests.judging.reports import ANSWERS, HOSTILE, answer, filled, report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not there: pip install -e .[browser]"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium"),
]
MANY = [
    one | {"index": 10 * number + place, "prompt": f"{one['prompt']} Number {number}."}
    for number in range(8)
    for place, one in enumerate(ANSWERS)
]
LONG = ANSWERS[0] | {"prompt": HOSTILE["long"], "base": answer(HOSTILE["one word"])}


@dataclass
class Seen:
    """A page, and all that it asked for or complained of."""

    page: object
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, tmp_path):
    """Open a page's text from a file, in a context of its own without a network."""
    contexts = []

    def opened(text, **options):
        path = tmp_path / f"{len(contexts)}.html"
        path.write_text(text, encoding="utf-8")
        context = chromium.new_context(offline=True, **options)
        contexts.append(context)
        seen = Seen(context.new_page())
        seen.page.on("request", lambda one: seen.requests.append(one.url))
        seen.page.on("console", lambda one: seen.complaints.append(one.text))
        seen.page.on("pageerror", lambda one: seen.complaints.append(str(one)))
        seen.page.on("dialog", lambda one: (seen.complaints.append("dialog"), one.dismiss()))
        seen.page.goto(path.as_uri())
        assert seen.requests == [path.as_uri()]
        return seen

    yield opened
    for context in contexts:
        context.close()


def shown(page):
    """Titles of the answers that can be seen."""
    return [one.text_content() for one in page.locator("article:visible h3").all()]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_do_nothing_and_are_shown(visit, name):
    seen = visit(page_of(filled(HOSTILE[name])))
    page = seen.page
    page.locator("#search").fill("no such text")
    page.locator("#search").fill("")
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("window.ran") is None
    assert page.locator("img, iframe, object, embed, link, article script").count() == 0
    assert page.locator("article:visible").count() == 2
    assert page.locator("article .prompt .text").first.bounding_box()["height"] > 10
    assert page.locator("article .prompt").first.evaluate("x => getComputedStyle(x).display") == (
        "block"
    )
    assert len(seen.requests) == 1
    assert seen.complaints == []


@pytest.mark.parametrize(
    "added",
    [
        "<script>document.title = 'ran'</script>",
        "<svg><script>document.title = 'ran'</script></svg>",
        "<img src='data:image/png,x' onerror=\"document.title = 'ran'\">",
        "<style>main { display: none }</style>",
        "<p style='position: fixed'>over it all</p>",
        "<iframe srcdoc=\"<script>top.document.title = 'ran'</script>\"></iframe>",
        "<a id=added href=\"javascript:document.title = 'ran'\">x</a>",
    ],
)
def test_the_policy_stops_markup_that_should_never_be_there(visit, added):
    """As if the escaping had failed."""
    made = page_of(report())
    seen = visit(made.replace("</main>", f"{added}</main>"))
    if "id=added" in added:
        seen.page.locator("#added").click()
    seen.page.wait_for_timeout(100)
    assert seen.page.title() == "learned: runs/starter-001"
    assert seen.page.locator("main").is_visible()
    assert seen.page.locator("p:text('over it all')").count() == 0 or (
        seen.page.locator("p:text('over it all')").evaluate("x => getComputedStyle(x).position")
        == "static"
    )
    assert any("Content Security Policy" in one for one in seen.complaints)


def test_the_filter_shows_a_part_and_counts_by_keyboard(visit):
    page = visit(page_of(report(answers=MANY))).page
    count = page.locator("#count")
    assert count.inner_text() == "24 of 24 prompts shown"
    assert len(shown(page)) == 24
    page.locator("#part-all").focus()
    page.keyboard.press("ArrowRight")
    assert count.inner_text() == "16 of 24 prompts shown"
    assert {one.split()[0] for one in shown(page)} == {"Seen"}
    page.keyboard.press("ArrowRight")
    assert count.inner_text() == "8 of 24 prompts shown"
    assert {one.split()[0] for one in shown(page)} == {"Held-out"}
    page.keyboard.press("Tab")
    page.keyboard.type("number 3.")
    assert count.inner_text() == "1 of 24 prompts shown"
    assert shown(page) == ["Held-out row 32"]
    page.keyboard.press("Enter")
    assert shown(page) == ["Held-out row 32"]
    page.locator("label[for=part-all]").click()
    assert count.inner_text() == "3 of 24 prompts shown"


@pytest.mark.parametrize(
    ("wanted", "found"), [("OFTEN BLUE", 8), ("may may", 8), ("2019-05-04", 8), ("<b>", 0)]
)
def test_the_search_looks_into_prompts_and_answers(visit, wanted, found):
    page = visit(page_of(report(answers=MANY))).page
    page.locator("#search").fill(wanted)
    assert page.locator("#count").inner_text() == f"{found} of 24 prompts shown"
    assert len(shown(page)) == found


def test_the_order_follows_the_change_of_rouge(visit):
    page = visit(page_of(report())).page
    given = ["Seen row 3", "Seen row 5", "Held-out row 312"]
    assert shown(page) == given
    page.locator("#order").select_option("loss")
    assert shown(page) == [*given[1:], given[0]]
    page.locator("#order").select_option("gain")
    assert shown(page) == given
    page.locator("#order").select_option("given")
    assert shown(page) == given


def test_marks_of_differences_go_away_with_a_press_of_space(visit):
    page = visit(page_of(report())).page
    line = "x => getComputedStyle(x).textDecorationLine"
    marks = [page.locator(f"article {tag}").first for tag in ("del", "ins")]
    assert [one.evaluate(line) for one in marks] == ["underline"] * 2
    page.locator("#mark").focus()
    page.keyboard.press("Space")
    assert [one.evaluate(line) for one in marks] == ["none"] * 2


def test_tab_reaches_everything_in_order(visit):
    page = visit(page_of(report(answers=[LONG]))).page
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        element = page.locator(":focus")
        if not element.count():
            break
        reached.append(
            element.evaluate(
                "x => x.id || x.getAttribute('href') || x.getAttribute('aria-label') "
                "|| x.getAttribute('aria-labelledby') || x.textContent"
            )
        )
        outline = element.evaluate("x => getComputedStyle(x).outlineStyle")
        assert outline != "none" or reached[-1].startswith("part-"), reached[-1]
    parts = ["#verdict", "#measured", "#curves", "#answers", "#made"]
    assert reached[:6] == ["#main", *parts]
    boxes = ["part-all", "search", "order", "mark", "Prompt 1, scrolls", "Base 1, scrolls"]
    at = reached.index("part-all")
    assert reached[at : at + 6] == boxes
    assert "figures-caption" in reached
    assert reached[-1] == "Versions"


def test_without_a_script_all_is_read_and_no_control_is_there(visit):
    page = visit(page_of(report(answers=MANY)), java_script_enabled=False).page
    assert page.locator("#controls").is_hidden()
    assert page.locator("article").count() == page.locator("article:visible").count() == 24
    for tag in ("h1", "#verdict", "#measured", "#curves", "#made"):
        assert page.locator(tag).is_visible()


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("name", ["one word", "long", "link", "arabic"])
def test_the_page_never_scrolls_sideways(visit, width, name):
    content = filled(HOSTILE[name]) | {"answers": [LONG, *MANY]}
    page = visit(page_of(content), viewport={"width": width, "height": 740}).page
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_answers_stand_side_by_side_and_on_a_phone_below_each_other(visit):
    made = page_of(report())
    wide = visit(made, viewport={"width": 1280, "height": 800}).page
    narrow = visit(made, viewport={"width": 360, "height": 740}).page

    def corner(page, name):
        box = page.locator(f"article .{name}").first.bounding_box()
        return box["x"], box["y"]

    (left, top), (right, level) = corner(wide, "base"), corner(wide, "tuned")
    assert left < right
    assert top == level
    (left, top), (right, level) = corner(narrow, "base"), corner(narrow, "tuned")
    assert left == right
    assert top < level


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("label", "width"),
    [("learned", 1280), ("memorised", 360), ("broken", 1280), ("no effect", 360)],
)
def test_axe_finds_nothing_serious(visit, scheme, label, width):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright",
        reason="axe is not there: pip install -e .[browser]",
    )
    verdict = report()["verdict"] | {"label": label}
    odd = ANSWERS[0] | {"reference": HOSTILE["arabic"], "base": answer(HOSTILE["bidi"])}
    odd |= {"prompt": HOSTILE["controls"], "tuned": answer(HOSTILE["zero width"])}
    made = page_of(report(answers=[LONG, odd, *ANSWERS], verdict=verdict))
    # axe is a script that the page's policy would rightly refuse.
    page = visit(
        made, color_scheme=scheme, viewport={"width": width, "height": 800}, bypass_csp=True
    ).page
    # Nor would axe see what the browser puts off drawing.
    page.add_style_tag(content="* { content-visibility: visible !important }")
    for summary in page.locator("summary").all():
        summary.click()
    found = axe.Axe().run(page).response
    assert len(found["passes"]) > 20
    assert "color-contrast" in {one["id"] for one in found["passes"]}
    grave = [
        (one["id"], [node["html"][:200] for node in one["nodes"]])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical", "moderate")
    ]
    assert grave == []


def test_print_leaves_out_the_controls_and_cuts_nothing(visit):
    page = visit(page_of(report(answers=[LONG]))).page
    page.emulate_media(media="print")
    assert page.locator("#controls").is_hidden()
    assert page.locator("nav").is_hidden()
    box = page.locator("article .prompt .text")
    assert box.evaluate("x => x.scrollHeight - x.clientHeight") <= 2
