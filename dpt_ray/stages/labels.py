"""labels: the few labelled images, drawn by a seed or read from a list, checked against the index."""

from __future__ import annotations

import json

import pyarrow.parquet as pq

from dpt_ray.config import ConfigError
from dpt_ray.config.sections import Labels as LabelSettings
from dpt_ray.data.labels import class_names, draw_labels, read_label_list
from dpt_ray.data.rows import LABELS_FILE
from dpt_ray.data.units import read_index
from dpt_ray.engine.node import Stage, Task, one_of, reads
from dpt_ray.store.records import Facts


class Labels(Stage[LabelSettings]):
    """(id, label) of the labelled images."""

    artifact = "labels"
    settings = LabelSettings
    inputs = reads({"index": one_of("index")})

    @classmethod
    def make(cls, task: Task[LabelSettings]) -> Facts:
        """Publish the table. Raises ConfigError for a bad list or a draw of more labels than are known."""
        labels = task.settings
        index, classes = read_index(task.inputs["index"]), task.inputs["index"].read_json("classes.json")
        try:
            if labels.file and labels.format == "csv" and not classes:
                names = json.dumps(class_names(labels.file), ensure_ascii=False)
                raise ValueError(
                    f"the images come without classes: name the list's with data.classes={names}"
                )
            if labels.file:
                table = read_label_list(labels.file, labels.format, index, classes)
            else:
                assert labels.per_class is not None  # checked by the section
                table = draw_labels(index, labels.per_class, labels.seed, classes)
        except (ValueError, OSError) as error:
            key = "labels.file" if labels.file else "labels.per_class"
            raise ConfigError(f"{key}: {error}") from error
        with task.out.writing(LABELS_FILE) as path:
            pq.write_table(table, path)
        return {"rows": table.num_rows}
