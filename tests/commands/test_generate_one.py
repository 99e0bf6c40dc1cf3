"""`dpt generate --only`: one image again."""

import numpy as np
import pytest
from PIL import Image

from tests.helpers.paths import DIGITS


@pytest.fixture
def generate(dpt, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = (*finished.overrides, "compute.threads=2", f"output={finished.output}")
    return lambda *arguments: dpt("generate", DIGITS, *settings, *arguments)


# The last unit is not published: 32 images per class are, 8 to a unit.
@pytest.mark.parametrize(("which", "said"), [("3/9", "identical to"), ("3/40", "not published before")])
def test_an_image_is_sampled_again_with_its_provenance(generate, finished, tmp_path, which, said):
    code, out, err = generate("--only", which)
    assert code == 0, err
    file = tmp_path / f"{which.replace('/', '-')}.png"
    assert out.startswith(f"written: {file.name} ({said}")
    with Image.open(file) as image:
        assert image.size == (8, 8) and np.asarray(image).std() > 0
        assert image.text["Source"] == f"run digits, class 3, index {which.rpartition('/')[2]}"
        assert finished.nodes()["denoiser"].digest in image.text["Description"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--only", "3"), "error: --only: '3': write CLASS/INDEX, such as 0/0"),
        (("--only", "12/0"), "error: --only: '12' is no class of this run: 0, 1, 2, 3, 4, ..."),
        (("--only", "3/x"), "error: --only: '3/x': write CLASS/INDEX"),
        (("--out", "a.png"), "error: --out a.png: is the file of --only"),
        (("--only", "3/0", "diffusion.steps=25"), "error: --only: the denoiser of run digits is not in"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(generate, arguments, error):
    code, _, said = generate(*arguments)
    assert code == 2 and said.startswith(error) and len(said.splitlines()) == 1


def test_a_file_that_exists_is_kept(generate, tmp_path):
    (tmp_path / "3-9.png").write_text("mine")
    code, _, said = generate("--only", "3/9")
    assert code == 2 and said.startswith("error: out: '3-9.png' exists; ") and len(said.splitlines()) == 1
    assert (tmp_path / "3-9.png").read_text() == "mine"
