"""The page on which images are labelled: what is in the file, and its script without a browser."""

import base64
import csv
import hashlib
import html
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from dpt_ray.report.label_page import PICTURE_PIXELS, LabelPage, render_label_page
from tests.helpers.paths import ROOT

SCRIPT = ROOT / "dpt_ray" / "report" / "label.js"
NASTY = ["</script><b>", 'say "cat", dog', "<!-- x", "a&amp;b", "Bäume\u2028"]


def picture(width=8, height=8, mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def page_of(text):
    """What the page gives to its script, by the rules of HTML: no entities, ended by the first </script."""
    [(_, found)] = re.findall(r'<script type="application/json" (id="page")>(.*?)</script', text, re.DOTALL)
    return json.loads(found)


def opened(uri):
    head, _, data = uri.partition(";base64,")
    return head, Image.open(io.BytesIO(base64.b64decode(data)))


def test_names_of_any_kind_reach_the_script_as_they_are():
    ids = [f"{name}/{i}" for i, name in enumerate(NASTY)]
    content = LabelPage("<i>t", [(i, picture()) for i in ids], NASTY, given=[(ids[0], NASTY[0])])
    text = render_label_page(content)
    page = page_of(text)
    assert page["classes"] == NASTY
    assert page["given"] == [[ids[0], NASTY[0]]]
    assert [image["id"] for image in page["images"]] == ids
    assert text.count("<script") == text.count("</script") == 2
    assert "<b>" not in text
    assert "<!-- x" not in text
    assert html.unescape(re.findall("<title>(.*?)</title>", text)[0]).startswith("<i>t")


def test_small_pictures_are_lossless_and_large_ones_are_scaled_with_their_shape():
    small, large = picture(32, 20), picture(900, 300, "L")
    one, two = page_of(render_label_page(LabelPage("t", [("a", small), ("b", large)])))["images"]
    head, shown = opened(one["src"])
    assert (head, one["small"], shown.tobytes()) == ("data:image/png", True, small.tobytes())
    head, shown = opened(two["src"])
    assert (head, two["small"], shown.mode) == ("data:image/jpeg", False, "L")
    assert shown.size == (PICTURE_PIXELS, PICTURE_PIXELS // 3)


def test_the_page_needs_nothing_else_and_may_run_its_own_script_only():
    text = render_label_page(LabelPage("t", [("a", picture())]))
    [policy] = re.findall(r'Content-Security-Policy" content="(.*?)"', text)
    policy = html.unescape(policy)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.read_bytes()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert not re.findall(r"https?:|@import|<link|src=\"(?!data)", text)


def test_what_was_typed_is_kept_for_the_same_content_only():
    def key(ids=("a", "b"), classes=("x",), given=()):
        content = LabelPage("t", [(i, picture()) for i in ids], classes, given=given)
        return page_of(render_label_page(content))["key"]

    others = [key(), key(ids=("b", "a")), key(classes=("x", "y")), key(given=[("c", "x")])]
    assert len(set(others)) == 4
    assert key() == key()


MANY = [f"x{letter}" for letter in "bcdefghijkl"]

# The script's logic, by Node.js -------------------------------------------------------------------------

node = pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js")
PAGE = {
    "key": "k",
    "open": False,
    "classes": ["cat", "cart", "dog", "wildcat"],
    "given": [["z", "dog"]],
    "images": [{"id": name} for name in "abcd"],
}


def js(expression, page=PAGE):
    """The value of an expression with the script's functions in `it`, and the `page` and a `state`."""
    code = (
        f"const it = require({json.dumps(str(SCRIPT))}); const page = {json.dumps(page)};"
        f"const state = it.newState(); console.log(JSON.stringify({expression}))"
    )
    result = subprocess.run(["node", "-e", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@node
def test_a_half_finished_list_holds_the_given_labels_and_the_labelled_images():
    page = PAGE | {"classes": [*PAGE["classes"], *NASTY], "images": [{"id": f"{n}/1"} for n in NASTY]}
    steps = [f"it.assign(state, {json.dumps(f'{name}/1')}, {json.dumps(name)})" for name in NASTY[:3]]
    steps.append(f"it.assign(state, {json.dumps(f'{NASTY[3]}/1')}, null)")
    text = js(f"({', '.join(steps)}, it.labelsCsv(page, state))", page)
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert rows == [{"id": "z", "label": "dog"}, *({"id": f"{n}/1", "label": n} for n in NASTY[:3])]


@node
@pytest.mark.parametrize(
    ("typed", "open_classes", "found"),
    [
        ("ca", False, ["cat", "cart", "wildcat"]),
        ("CAT", False, ["cat", "wildcat"]),
        ("cat", True, ["cat", "wildcat"]),
        ("car", True, ["cart", "+car"]),
        (" owl ", True, ["+owl"]),
        ("owl", False, []),
        (" ", True, []),
    ],
)
def test_what_enter_can_choose_of_a_typed_text(typed, open_classes, found):
    options = js(f"it.completions(page.classes, {json.dumps(typed)}, {json.dumps(open_classes)})")
    assert [f"{'+' if option['isNew'] else ''}{option['label']}" for option in options] == found


@node
@pytest.mark.parametrize(
    ("classes", "keys"),
    [
        (["cat", "dog"], {"1": "cat", "2": "dog"}),
        (list("abcdefghijkl"), dict(zip("abcdefghijkl", "abcdefghijkl", strict=True))),
        (["xa", *MANY], dict(zip("1234567890", ["xa", *MANY], strict=False))),
        ([str(digit) for digit in range(10)], {str(digit): str(digit) for digit in range(10)}),
        (["1", "10", "x"], {"x": "x"}),
        (["A", "apple", "b"], {"b": "b", "1": "A", "2": "apple"}),
    ],
)
def test_which_key_gives_which_class_at_once(classes, keys):
    assert js(f"Object.fromEntries(it.shortcuts({json.dumps(classes)}))") == keys


@node
def test_no_character_is_a_class_at_once_where_classes_are_open():
    for classes in (["1", "a"], ["a", "b"]):
        assert js(f"Object.fromEntries(it.shortcuts({json.dumps(classes)}, true))") == {}


@node
def test_undo_takes_back_a_class_a_change_and_a_skip():
    steps = "it.assign(state, 'a', 'cat'), it.assign(state, 'a', 'dog'), it.assign(state, 'b', null)"
    left = "[...state.labels, ...state.skipped]"
    undone = ", ".join([f"it.undo(state), {left}"] * 4)
    found = js(f"({steps}, [{left}, {undone}])")
    assert found == [
        [["a", "dog"], "b"],
        "b",
        [["a", "dog"]],
        "a",
        [["a", "cat"]],
        "a",
        [],
        None,
        [],
    ]


@node
@pytest.mark.parametrize(
    ("steps", "open_classes", "said"),
    [
        ([], False, "0 of 4, 3 classes without a label"),
        (["'a', 'cat'", "'b', null"], False, "1 of 4, 2 classes without a label, 1 skipped"),
        (["'a', 'cat'", "'b', 'cart'", "'c', 'wildcat'"], False, "3 of 4, every class has a label"),
        (["'a', 'owl'"], True, "1 of 4, 5 classes"),
    ],
)
def test_the_progress_counts_images_and_classes(steps, open_classes, said):
    done = [f"it.assign(state, {step})" for step in steps]
    page = PAGE | {"open": open_classes}
    assert js(f"({', '.join([*done, 'it.progressText(page, state)'])})", page) == said


@node
def test_the_next_image_is_one_without_a_class_from_the_start_again():
    steps = "it.assign(state, 'd', 'cat'), it.assign(state, 'b', null)"
    assert js(f"({steps}, [0, 1, 2, 3].map((i) => it.nextOpen(page, state, i)))") == [2, 2, 0, 0]
    everything = ", ".join(f"it.assign(state, '{name}', 'cat')" for name in "abcd")
    assert js(f"({everything}, it.nextOpen(page, state, 0))") == -1


@node
@pytest.mark.parametrize("text", ["null", "{", "3", '{"labels": 3}', '{"labels": [["a"]]}'])
def test_a_state_that_something_else_wrote_is_forgotten(text):
    assert js(f"it.pack(it.unpack(page, {json.dumps(text)}))") == '{"labels":[],"skipped":[]}'


@node
def test_a_state_is_kept_without_images_and_classes_that_are_gone():
    text = json.dumps({"labels": [["a", "cat"], ["b", "owl"], ["y", "cat"]], "skipped": ["c", "y", "a"]})
    kept = json.loads(js(f"it.pack(it.unpack(page, {json.dumps(text)}))"))
    assert kept == {"labels": [["a", "cat"]], "skipped": ["c"]}
