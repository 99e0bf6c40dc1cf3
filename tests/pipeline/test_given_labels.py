"""Stage 2 on pseudo-labels that the user brings."""

import pyarrow.parquet as pq
import pytest

from dpt_ray.config import ConfigError, load_config
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


@pytest.mark.parametrize("changes", [["labels_from=file"], ["pseudo_labels_file=x.csv"]])
def test_the_table_and_labels_from_go_together(changes):
    with pytest.raises(ConfigError, match="set both labels_from=file and the table, or neither"):
        load_config(DIGITS, changes)
