"""What `dpt plan` and `dpt status` say of a run: what is done, what is not and why, what it costs."""

import json
import re

import pytest

from dpt_ray.store.artifact import Store
from tests.helpers.paths import CONFIGS, DIGITS
from tests.helpers.tables import row
from tests.helpers.tiny_run import TinyRun

IMAGENET = CONFIGS / "imagenet256_msn_b4_1label.yaml"


def test_a_plan_says_what_is_to_do_and_why_and_does_nothing(dpt, tmp_path):
    code, out, _ = dpt("plan", DIGITS, f"output={tmp_path}/out")
    assert code == 0
    assert row(out, "index")[3:] == ["to do", "not made yet"]
    assert row(out, "labels")[3:] == ["to do", "waits for index"]
    assert row(out, "denoiser")[3] == row(out, "report")[3] == "to do"
    assert row(out, "samples")[1].endswith("@k128")
    assert not list(tmp_path.iterdir())


def test_a_plan_tells_a_changed_setting_from_what_is_done(dpt, tmp_path):
    output = f"output={tmp_path}"
    assert dpt("index", DIGITS, output)[0] == 0
    _, out, _ = dpt("plan", DIGITS, output)
    assert row(out, "index")[3:] == row(out, "labels")[3:] == ["done", ""]
    assert row(out, "encoder")[3:] == ["to do", "not made yet"]
    _, out, _ = dpt("plan", DIGITS, output, "labels.per_class=3")
    assert row(out, "labels")[3:] == ["to do", "per_class is 3, published with 1"]
    _, out, _ = dpt("plan", DIGITS, output, "data.split_seed=3")
    assert row(out, "index")[3:] == ["to do", "split_seed is 3, published with 0"]
    assert row(out, "labels")[3:] == ["to do", "waits for index"]


def test_a_plan_counts_the_images_before_the_first_run_and_after(dpt, tmp_path):
    def cost(name):
        return row(out[out.index("computed cost") :], name)[1:]

    output = tmp_path / "out"
    for indexed in (False, True):
        _, out, _ = dpt("plan", DIGITS, f"output={output}")
        assert output.exists() == indexed
        assert cost("features")[:2] == ["1,797", "460.0 kB"]  # 64 numbers of 4 bytes each
        assert cost("moments")[:2] == ["997", "255.2 kB"]  # training images only
        assert cost("samples")[0] == cost("augmented")[0] == "1,280"
        assert cost("sweep")[0] == "32" and cost("sweep")[3] == "-"  # trials; fits use no GPU
        assert re.fullmatch(r"\d+ s", cost("sweep")[4])
        for name in ("encoder", "denoiser", "referee", "total to do"):
            assert cost(name)[3] == "< 0.01"
            assert re.fullmatch(r"\d+ (s|min|h|h \d+ min)", cost(name)[4])
        assert dpt("index", DIGITS, f"output={output}")[0] == 0


def test_a_plan_of_so_many_images_leaves_out_what_it_cannot_know(dpt, tmp_path):
    weights = ("evaluate.inception=/none.pth", f"output={tmp_path}")
    _, out, _ = dpt("plan", DIGITS, *weights, "--images", 1000, "--classes", 10)
    assert row(out, "features")[1:3] == ["1,000", "256.0 kB"]
    assert row(out, "inception_reference")[1:] == ["-"] * 5


@pytest.mark.parametrize(("one", "other"), [("--classes", "--images"), ("--images", "--classes")])
def test_a_plan_of_so_many_images_needs_their_classes_too(dpt, tmp_path, one, other):
    code, out, err = dpt("plan", DIGITS, f"output={tmp_path}", one, 10)
    assert (code, out) == (2, "") and err == f"error: {one} 10 needs {other}: give both, or neither\n"


@pytest.mark.parametrize("counts", [(0, 10), (10, 0), (-1, 10)])
def test_a_plan_of_no_images_or_classes_is_refused(dpt, tmp_path, counts):
    images, classes = counts
    code, out, err = dpt("plan", DIGITS, f"output={tmp_path}", "--images", images, "--classes", classes)
    assert (code, out) == (2, "") and err.endswith(": give at least 1\n") and err.count("\n") == 1


def test_a_plan_with_prices_says_what_each_gpu_would_cost(dpt, tmp_path):
    prices = tmp_path / "prices.yaml"
    prices.write_text(
        "gpus: {fast: {tflops: 989, hour: 4}, slow: {tflops: 98.9, hour: 1}}\nstorage_tb_month: 1e6"
    )
    size = ("--images", 1_281_167, "--classes", 1000, f"output={tmp_path}")
    _, out, _ = dpt("plan", IMAGENET, *size, "--prices", prices)
    least, most = limits(row(out, "total to do")[4])
    assert limits(row(out, "fast")[1]) == (least, most)  # 989 TFLOP/s is the data sheet's of the H200
    assert limits(row(out, "fast")[2]) == pytest.approx((4 * least, 4 * most), rel=0.01)
    assert limits(row(out, "slow")[1]) == pytest.approx((10 * least, 10 * most), rel=0.01)
    stored, unit = row(out, "total to do")[2].split()
    assert unit == "GB"
    shown = re.search(r"at most USD ([\d,]+) a month", " ".join(out.split()))[1]
    assert float(shown.replace(",", "")) == pytest.approx(float(stored) * 1000, rel=0.01)


def limits(cell):
    """The two numbers of "1,041 to 2,083"."""
    return tuple(float(number.replace(",", "")) for number in cell.split(" to "))


def test_prices_that_cannot_be_read_are_named(dpt, tmp_path):
    prices = tmp_path / "prices.yaml"
    prices.write_text("gpus: {fast: {tflop: 989, hour: 4}}")
    code, _, err = dpt("plan", DIGITS, f"output={tmp_path}", "--prices", prices)
    assert code == 2 and "gpus.fast.tflop" in err and err.count("\n") == 1


def test_the_status_says_what_a_run_has_spent_of_its_cap(dpt, tmp_path):
    folder = tmp_path / "runs" / "digits" / "spent"
    folder.mkdir(parents=True)
    attempt = {"step": "features", "made": ["features/0"], "started": "2026-01-01", "gpus": 4}
    for name, seconds in (("a", 1800), ("b", 900)):
        (folder / f"{name}.json").write_text(json.dumps(attempt | {"seconds": seconds}))
    cap = ("compute.max_gpu_hours=8", "compute.actor_gpus=1", f"output={tmp_path}")
    _, out, _ = dpt("status", DIGITS, *cap)
    assert "has spent 3.00 GPU hours in 2 attempts at its stages, of 8 that it may" in " ".join(out.split())


def test_a_plan_compares_with_the_nearest_of_what_is_done(dpt, tmp_path):
    output = f"output={tmp_path}"
    for overrides in (["labels.per_class=3", "labels.seed=4"], ["labels.per_class=2"]):
        assert dpt("index", DIGITS, output, *overrides)[0] == 0
    _, out, _ = dpt("plan", DIGITS, output)
    assert row(out, "labels")[4] == "per_class is 1, published with 2"


def test_a_plan_names_the_input_that_is_another(dpt, tmp_path):
    output = f"output={tmp_path}"
    for overrides in ([], ["data.split_seed=3"]):
        assert dpt("index", DIGITS, output, *overrides)[0] == 0
    _, out, _ = dpt("plan", DIGITS, output)
    Store(str(tmp_path)).remove(*row(out, "labels")[1].split("/"))
    _, out, _ = dpt("plan", DIGITS, output)
    assert row(out, "labels")[3:] == ["to do", "index differs"]


def test_status_shows_what_is_published(dpt, tmp_path):
    assert dpt("index", DIGITS, f"output={tmp_path}")[0] == 0
    code, out, _ = dpt("status", DIGITS, f"output={tmp_path}")
    assert code == 0
    assert row(out, "index")[2:4] == ["done", "1797"]  # scikit-learn's digits
    assert row(out, "labels")[2:4] == ["done", "10"]  # one of each class
    assert row(out, "encoder")[2:] == ["to do", *["-"] * 5]


def test_status_shows_how_far_a_stage_is_that_was_not_finished(dpt, tmp_path):
    run = TinyRun(tmp_path)
    run.make("labels")
    encoder = run.artifact("encoder")
    records = [{"step": step, "loss": 2.5 / step} for step in (10, 20)]
    encoder.write_bytes("log.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())
    run.artifact("samples").publish_shard("a", ".parquet", 1, lambda path: path.write_bytes(b"x"))
    _, out, _ = dpt("status", DIGITS, *run.overrides, f"output={tmp_path}")
    assert row(out, "encoder")[2] == "step 20, loss 0.125"
    assert row(out, "samples")[2] == "1 shard done"
