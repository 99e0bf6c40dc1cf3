"""The units of an index that is written as several files."""

import pyarrow as pa
import pytest

from dpt_ray.data import units
from dpt_ray.data.index import SCHEMA
from dpt_ray.store.artifact import Artifact

ROWS = 10


@pytest.fixture
def table(tmp_path):
    """Ten rows of two splits, mixed; each image's file holds its name."""
    for number in range(ROWS):
        (tmp_path / f"{number}.png").write_text(f"bytes of {number}")
    columns = {
        "id": [f"image {number}" for number in range(ROWS)],
        "uri": [str(tmp_path / f"{number}.png") for number in range(ROWS)],
        "offset": [0] * ROWS,
        "length": [-1] * ROWS,
        "split": ["test" if number % 3 == 0 else "train" for number in range(ROWS)],
        "label": [number % 2 for number in range(ROWS)],
    }
    return pa.table(columns, SCHEMA)


@pytest.mark.parametrize("per_file", [1, 2, 1024])
def test_the_files_of_an_index_hold_its_units_in_order(table, tmp_path, monkeypatch, per_file):
    monkeypatch.setattr(units, "ROWS", 2)
    monkeypatch.setattr(units, "PER_FILE", per_file)
    index = Artifact(str(tmp_path / "index"))
    listed = units.write_index(index, table)
    index.publish({"units": listed})

    assert [(unit["shard"], unit["rows"]) for unit in listed] == [
        *(("train-000000", 2), ("train-000001", 2), ("train-000002", 2)),
        *(("test-000000", 2), ("test-000001", 2)),
    ]
    files = sorted(path.name for path in (tmp_path / "index").glob("*.parquet"))
    assert len(files) == -(-len(listed) // per_file) and files[-1] == units.INDEX
    read = [units.read_unit(index, unit) for unit in units.list_units(index)]
    by_id = {name: data for names, found in read for name, data in zip(names, found, strict=True)}
    assert by_id == {f"image {number}": f"bytes of {number}".encode() for number in range(ROWS)}
    whole = units.read_index(index)
    assert whole["id"].to_pylist() == [name for names, _ in read for name in names]
    assert whole.sort_by("id").equals(table.sort_by("id"))
    assert units.find_rows(index, {"image 3", "image 8"})["id"].to_pylist() == ["image 8", "image 3"]
