import hashlib
import os
import tempfile
import zipfile
from pathlib import Path

import fsspec
import pytest
import safetensors.torch
import torch
from torch import nn

from dpt_ray.models.weights import load_strict, load_weights, save_weights, sha256

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([7, 8])}


class TouchesAFile:
    """What a hostile checkpoint holds: unpickling it runs a command."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def assert_same(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_by_name_and_never_runs(tmp_path, zipped):
    marker, file = tmp_path / "ran", tmp_path / "hostile.pth"
    content = {**TENSORS, "hook": TouchesAFile(marker)}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"hostile\.pth: refused.*mkdir.*safetensors") as caught:
        load_weights(file)
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar", ".ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_old_and_new_load(tmp_path, suffix, zipped):
    file = tmp_path / f"w{suffix}"
    torch.save(TENSORS, file, _use_new_zipfile_serialization=zipped)
    assert_same(load_weights(file), TENSORS)


def test_a_checkpoint_that_would_swell_is_refused_unread(tmp_path, monkeypatch):
    """A pickle of a gigabyte of zeros takes a megabyte, compressed."""
    torch.save(TENSORS, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as honest, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
        for part in honest.infolist():
            kind = zipfile.ZIP_DEFLATED if part.filename.endswith("data.pkl") else zipfile.ZIP_STORED
            bomb.writestr(part.filename, honest.read(part), kind)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(ValueError, match=r"bomb\.pth: refused, since .*/data\.pkl in it is compressed"):
        load_weights(tmp_path / "bomb.pth")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.95])
def test_a_truncated_file_is_named(tmp_path, kind, part):
    file = tmp_path / ("cut.safetensors" if kind == "safetensors" else "cut.pth")
    if kind == "safetensors":
        safetensors.torch.save_file(TENSORS, file)
    else:
        torch.save(TENSORS, file, _use_new_zipfile_serialization=kind == "zip")
    content = file.read_bytes()
    file.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=r"cut\.") as caught:
        load_weights(file)
    assert "\n" not in str(caught.value)


def test_a_web_page_saved_as_a_checkpoint_is_named(tmp_path):
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"page\.pth"):
        load_weights(tmp_path / "page.pth")


def test_what_is_saved_is_what_safetensors_reads_and_equal_tensors_give_equal_bytes(tmp_path):
    transposed = {"t": TENSORS["a"].T, **TENSORS}
    save_weights(transposed, tmp_path / "one.safetensors")
    save_weights(dict(reversed(transposed.items())), tmp_path / "two.safetensors")
    assert_same(safetensors.torch.load_file(tmp_path / "one.safetensors"), transposed)
    assert_same(load_weights(tmp_path / "one.safetensors"), transposed)
    one, two = (tmp_path / f"{n}.safetensors" for n in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert {file.name for file in tmp_path.iterdir()} == {one.name, two.name}


def test_one_section_of_a_checkpoint_is_loaded_and_an_absent_one_lists_those_there(tmp_path):
    file = tmp_path / "run.pth.tar"
    torch.save({"target": TENSORS, "encoder": {"a": torch.zeros(1)}, "epoch": 3}, file)
    assert_same(load_weights(file, section="target"), TENSORS)
    with pytest.raises(ValueError, match=r"no section 'ema'.*target.*encoder"):
        load_weights(file, section="ema")
    with pytest.raises(ValueError, match=r"run\.pth\.tar.*epoch.*name the section"):
        load_weights(file)


@pytest.mark.parametrize("section", ["state_dict", "model"])
def test_the_usual_section_is_found_without_being_named(tmp_path, section):
    torch.save({section: TENSORS, "epoch": 3}, tmp_path / "run.ckpt")
    assert_same(load_weights(tmp_path / "run.ckpt"), TENSORS)


def test_strict_loading_names_what_is_missing_unexpected_and_of_another_shape():
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    tensors = {"weight": torch.zeros(2, 4), "extra": torch.zeros(1)}
    with pytest.raises(ValueError) as caught:
        load_strict(module, tensors, "file.pth")
    message = str(caught.value)
    assert message.startswith("file.pth: not the weights of this Linear")
    assert "1 missing (bias)" in message
    assert "1 unexpected (extra)" in message
    assert "weight (2, 4) for (2, 3)" in message
    torch.testing.assert_close(module.weight, before, rtol=0, atol=0)


def test_a_long_list_of_missing_keys_is_counted_and_cut():
    module = nn.Sequential(*(nn.Linear(1, 1) for _ in range(5)))
    with pytest.raises(ValueError, match=r"10 missing \(0\.bias, 0\.weight, 1\.bias, 1\.weight, "):
        load_strict(module, {}, "empty.pth")


def test_a_remote_file_is_read_and_read_anew_after_it_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    uri = "memory://weights/w.safetensors"
    for tensors in (TENSORS, {"c": torch.ones(5)}):
        content = safetensors.torch.save(tensors)
        with fsspec.open(uri, "wb") as file:
            file.write(content)
        assert_same(load_weights(uri), tensors)
        assert sha256(uri) == hashlib.sha256(content).hexdigest()


def test_a_missing_file_and_a_foreign_suffix_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.pth: no such file"):
        load_weights(tmp_path / "nowhere.pth")
    (tmp_path / "w.h5").touch()
    with pytest.raises(ValueError, match=r"w\.h5: not a weight file"):
        load_weights(tmp_path / "w.h5")
