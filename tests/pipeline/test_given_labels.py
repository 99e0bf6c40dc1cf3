"""Stage 2 on pseudo-labels that the user brings."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpt_ray.config import ConfigError, load_config
from dpt_ray.data.rows import RealRows
from tests.helpers.paths import DIGITS
from tests.helpers.runs import make

TINY = ("generate_in=features", "feature_diffusion={steps: 4, width: 16, batch_size: 32}", "labels_from=file")


def table(finished, path):
    """The true labels of the training images as the user's table."""
    index = pq.read_table(finished.artifact("index").local_file("index.parquet")).to_pylist()
    rows = [f"{row['id']},{row['label']},0.5" for row in index if row["split"] == "train"]
    path.write_text("\n".join(["id,label,confidence", *rows]) + "\n")
    return rows


def test_stage_2_trains_on_the_table_which_counts_by_its_content(finished, tmp_path):
    rows = table(finished, tmp_path / "mine.csv")
    run = finished.copy_to(tmp_path / "run", *TINY, f"pseudo_labels_file={tmp_path}/mine.csv")
    assert make(run.config, "feature_denoiser") == ["given_labels", "feature_denoiser"]
    given = run.artifact("given_labels")
    assert given.manifest["rows"] == len(rows)
    assert run.nodes()["feature_denoiser"].inputs["pseudo_labels"].name == "given_labels"
    (tmp_path / "mine.csv").rename(tmp_path / "moved.csv")
    moved = load_config(
        DIGITS, [*run.overrides, f"output={run.output}", f"pseudo_labels_file={tmp_path}/moved.csv"]
    )
    assert make(moved, "feature_denoiser") == []


def test_a_table_that_lacks_an_image_is_refused_before_any_training(finished, tmp_path):
    table(finished, tmp_path / "mine.csv")
    lines = (tmp_path / "mine.csv").read_text().splitlines()
    (tmp_path / "mine.csv").write_text("\n".join(lines[:-1]) + "\n")
    run = finished.copy_to(tmp_path / "run", *TINY, f"pseudo_labels_file={tmp_path}/mine.csv")
    with pytest.raises(ConfigError, match=r"pseudo_labels_file: .*1 of \d+ training images have no row"):
        make(run.config, "feature_denoiser")


def test_the_table_has_a_row_of_an_unreadable_image_too(finished, tmp_path):
    rows = table(finished, tmp_path / "mine.csv")
    run = finished.copy_to(tmp_path / "run", *TINY, f"pseudo_labels_file={tmp_path}/mine.csv")
    make(run.config, "given_labels")
    real = RealRows(run.artifact("index"), run.artifact("features"), ("train",))
    whole = len(real.pseudo_labelled(run.artifact("given_labels")))
    real.ids, real.features = real.ids[1:], real.features[1:]  # as where the first one cannot be read
    found = real.pseudo_labelled(run.artifact("given_labels"))
    assert (whole, len(found)) == (len(rows), len(rows) - 1)
    ids = real.ids.take(pa.array(found.index)).to_pylist()
    truth = dict(row.split(",")[:2] for row in rows)
    assert found.labels.tolist() == [int(truth[name]) for name in ids]


@pytest.mark.parametrize("changes", [["labels_from=file"], ["pseudo_labels_file=x.csv"]])
def test_the_table_and_labels_from_go_together(changes):
    with pytest.raises(ConfigError, match="set both labels_from=file and the table, or neither"):
        load_config(DIGITS, changes)
