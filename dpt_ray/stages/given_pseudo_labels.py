"""Pseudo-labels that the user brings, such as those of a zero-shot classifier, checked against the index."""

from __future__ import annotations

from typing import Annotated

import pyarrow.parquet as pq

from dpt_ray.config import ConfigError
from dpt_ray.config.hashing import HashedFile, Settings
from dpt_ray.data.pseudo_label_list import read_pseudo_label_list
from dpt_ray.data.rows import PSEUDO_LABELS_FILE
from dpt_ray.data.units import read_index
from dpt_ray.engine.node import Stage, Task, one_of, reads
from dpt_ray.store.records import Facts


class GivenPseudoLabelsSettings(Settings):
    """The table; it counts by its content."""

    file: Annotated[str, HashedFile(key="pseudo_labels_file")]


class GivenPseudoLabels(Stage[GivenPseudoLabelsSettings]):
    """One Parquet table with a row for each training image, as the stage `pseudo_labels` makes it."""

    artifact = "pseudo_labels"
    settings = GivenPseudoLabelsSettings
    inputs = reads({"index": one_of("index")})

    @classmethod
    def make(cls, task: Task[GivenPseudoLabelsSettings]) -> Facts:
        """Publish the table. Raises ConfigError for one that does not fit the images."""
        index = task.inputs["index"]
        try:
            table = read_pseudo_label_list(
                task.settings.file, read_index(index), index.read_json("classes.json")
            )
        except (ValueError, OSError) as error:
            raise ConfigError(f"pseudo_labels_file: {error}") from error
        with task.out.writing(PSEUDO_LABELS_FILE) as path:
            pq.write_table(table, path)
        return {"rows": table.num_rows, "calibration": {"temperature": 1.0, "n": 0}}
