"""The page on which images are labelled, in Chromium: as a person uses it."""

import csv
import io
import shutil

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dpt_ray.data.index import SCHEMA
from dpt_ray.data.labels import class_names, read_label_list
from dpt_ray.report.label_page import LabelPage, render_label_page

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")

IDS = ['a "quoted", id', "<b>bold</b>", "c/3", "d/4", "e/5"]
CLASSES = ["cat", "dog", "</script><script>document.title = 'run'</script>"]
SIZES = {"narrow": (400, 800), "wide": (1200, 900)}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # Without a sandbox, which a container's root user cannot have; the page is our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Open a page from its file; no error, no message and no request but the file itself are allowed."""
    problems, contexts = [], []

    def open_page(size="wide", scheme="light", context=None, **content):
        path = tmp_path / "to_label.html"
        images = [(name, picture(i)) for i, name in enumerate(IDS)]
        path.write_text(render_label_page(LabelPage("flowers", images, **content)), encoding="utf-8")
        width, height = SIZES[size]
        if context is None:
            viewport = {"width": width, "height": height}
            context = browser.new_context(viewport=viewport, color_scheme=scheme)
            contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        outside = ("file:", "data:", "blob:")
        page.on("request", lambda r: r.url.startswith(outside) or problems.append(r.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), np.uint8)
    return Image.fromarray(pixels).resize((240, 240))


def press(page, *keys):
    for key in keys:
        page.keyboard.press(key)


def saved(page):
    """The text of labels.csv as the browser downloads it."""
    with page.expect_download() as download:
        page.get_by_role("button", name="Save labels.csv").click()
    assert download.value.suggested_filename == "labels.csv"
    return download.value.path().read_text(encoding="utf-8")


def labels(text):
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert rows[0] == ["id", "label"]
    return rows[1:]


def progress(page):
    return page.locator("#progress").inner_text()


def index():
    rows = [(name, "file:///x", 0, 1, "train", None) for name in IDS]
    columns = zip(*rows, strict=True)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], SCHEMA)


def test_labels_by_key_by_typing_and_by_click_are_saved_as_a_label_list(visit, tmp_path):
    page = visit(classes=CLASSES)
    press(page, "1")  # the first class
    page.keyboard.type("</scr")
    press(page, "Enter")  # the completion
    page.get_by_role("button", name="dog: ").click()
    press(page, "Space", "ArrowLeft")
    assert progress(page) == "3 of 5, every class has a label, 1 skipped"
    press(page, "2")  # the skipped one
    page.keyboard.type("ca")
    press(page, "Enter")
    text = saved(page)
    assert labels(text) == [
        list(row) for row in zip(IDS, ["cat", CLASSES[2], "dog", "dog", "cat"], strict=True)
    ]
    assert page.title() == "flowers – images to label"
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    table = read_label_list(str(tmp_path / "labels.csv"), "csv", index(), CLASSES)
    assert table["id"].to_pylist() == IDS
    assert table["label"].to_pylist() == [0, 2, 1, 1, 0]


def test_a_new_class_may_begin_with_a_digit(visit):
    page = visit(open_classes=True)
    for name in ("oak", "ash", "1980s car"):
        page.keyboard.type(name)
        press(page, "Enter")
    assert labels(saved(page)) == [[IDS[0], "oak"], [IDS[1], "ash"], [IDS[2], "1980s car"]]


@pytest.mark.parametrize(("key", "said"), [("1", "1 of 5, 2 classes without"), ("Space", "1 skipped")])
def test_a_key_that_is_held_down_counts_once(visit, key, said):
    page = visit(classes=CLASSES)
    for _ in range(4):  # as a keyboard repeats it
        page.keyboard.down(key)
    page.keyboard.up(key)
    assert said in progress(page)
    press(page, "2")
    assert labels(saved(page))[-1][0] == IDS[1]


def test_two_tabs_of_a_page_have_the_same_labels(visit):
    first = visit(classes=CLASSES)
    second = visit(classes=CLASSES, context=first.context)
    press(first, "1", "2")
    second.wait_for_function("document.getElementById('progress').textContent.startsWith('2 of')")
    press(second, "ArrowRight", "ArrowRight", "2")
    first.wait_for_function("document.getElementById('progress').textContent.startsWith('3 of')")
    assert [name for name, _ in labels(saved(second))] == IDS[:3]


def test_classes_that_nobody_knew_are_named_and_told(visit, tmp_path):
    page = visit(open_classes=True)
    for name in ("oak", "Oak", "ash"):
        page.keyboard.type(name)
        press(page, "Enter")
    assert progress(page) == "3 of 5, 2 classes"
    text = saved(page)
    assert labels(text) == [[IDS[0], "oak"], [IDS[1], "oak"], [IDS[2], "ash"]]
    assert 'data.classes: ["oak","ash"]' in page.locator("#status").inner_text()
    (tmp_path / "labels.csv").write_text(text)
    assert class_names(str(tmp_path / "labels.csv")) == ["ash", "oak"]


def test_no_class_can_be_added_to_those_that_are_known(visit):
    page = visit(classes=CLASSES)
    page.keyboard.type("owl")
    press(page, "Enter")
    assert "no class “owl”" in page.locator("#status").inner_text()
    assert progress(page).startswith("0 of 5")


def test_a_half_finished_list_says_so_and_begins_with_the_given_labels(visit):
    page = visit(classes=CLASSES, given=[("z", "dog")])
    assert progress(page) == "0 of 5, 2 classes without a label"
    press(page, "1")
    assert labels(saved(page)) == [["z", "dog"], [IDS[0], "cat"]]
    said = page.locator("#status").inner_text()
    assert "1 of 5" in said
    assert "The other 4 are not in it" in said


def test_what_was_set_survives_a_reload_and_another_set_of_images_does_not_see_it(visit):
    page = visit(classes=CLASSES)
    press(page, "1", "2", "Space")
    page.reload()
    assert progress(page) == "2 of 5, 1 class without a label, 1 skipped"
    assert "4 of 5" in page.locator("#where").inner_text()
    assert "2 labels of an earlier visit" in page.locator("#status").inner_text()
    other = visit(classes=CLASSES, given=[("z", "dog")], context=page.context)
    assert progress(other).startswith("0 of 5")


def test_undo_goes_back_to_the_image(visit):
    page = visit(classes=CLASSES)
    press(page, "1", "2", "Control+z")
    assert progress(page).startswith("1 of 5")
    assert IDS[1] in page.locator("#where").inner_text()
    page.get_by_role("button", name="Undo").click()
    assert progress(page).startswith("0 of 5")
    assert page.get_by_role("button", name="Undo").is_disabled()


def test_a_completion_is_marked_with_the_arrows_and_escape_clears(visit):
    page = visit(classes=["ash", "aspen", "oak"])
    field = page.get_by_role("combobox", name="Class of this image")
    page.keyboard.type("as")
    assert field.get_attribute("aria-expanded") == "true"
    assert page.locator("[aria-selected=true]").inner_text() == "ash"
    press(page, "ArrowDown")
    assert page.locator("[aria-selected=true]").inner_text() == "aspen"
    assert page.locator(f"#{field.get_attribute('aria-activedescendant')}").inner_text() == "aspen"
    press(page, "Enter")
    page.keyboard.type("oa")
    press(page, "Escape", "Space")
    assert progress(page) == "1 of 5, 2 classes without a label, 1 skipped"


def test_a_browser_that_keeps_nothing_is_told_of(visit):
    page = visit(classes=CLASSES)
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full') } }")
    press(page, "1")
    assert "keeps nothing" in page.locator("#status").inner_text()
    assert len(labels(saved(page))) == 1


CONTRAST = """() => {
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    const color = getComputedStyle(e).backgroundColor;
    return /, 0\\)$/.test(color) && e.parentElement ? ground(e.parentElement) : color;
  };
  const texts = [...document.querySelectorAll('h1, h2, p, span, button, label, small, summary, li, input')]
    .filter((e) => e.offsetParent && !e.disabled && (e.tagName === 'INPUT' ? e.value : e.textContent).trim());
  return texts.map((e) => {
    const [a, b] = [luminance(getComputedStyle(e).color), luminance(ground(e))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 80)];
  }).filter(([ratio]) => ratio < 4.5);
}"""  # WCAG 2, success criterion 1.4.3: text has a contrast of at least 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_cut_off_and_everything_can_be_read_and_named(visit, size, scheme):
    page = visit(size, scheme, classes=[*CLASSES, "a class with a name that is long" * 3])
    press(page, "1", "o")
    width, _ = SIZES[size]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CONTRAST) == []
    unnamed = "[...document.querySelectorAll('button')].filter((b) => !(b.ariaLabel ?? b.textContent).trim())"
    assert page.evaluate(f"{unnamed}.length") == 0
    small = page.evaluate(
        "[...document.querySelectorAll('button')].filter((b) => b.offsetHeight < 40).map((b) => b.outerHTML)"
    )
    assert small == []
    assert page.locator("#image").bounding_box()["width"] >= 150


def test_every_control_is_reached_with_the_tab_key_in_order(visit):
    page = visit(classes=["cat", "dog"])
    names = []
    for key in ("Shift+Tab", *["Tab"] * 8):
        press(page, key)  # the field has the focus at first
        names.append(page.evaluate("document.activeElement.textContent || document.activeElement.id"))
    expected = ["Save labels.csv", "class", "Set", "Previous", "Skip", "Next", "1cat0", "2dog0", "Keys"]
    assert names == expected  # Undo has nothing to undo
