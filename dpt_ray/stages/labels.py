"""labels: the few labelled images, drawn by a seed or read from a list, checked against the index."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq

from dpt_ray.config import ConfigError
from dpt_ray.config.sections import Labels
from dpt_ray.data.labels import draw_labels, read_label_list
from dpt_ray.data.units import read_index
from dpt_ray.engine.node import Task

LABELS = "labels.parquet"


def make(task: Task) -> dict[str, Any]:
    """Publishes (id, label) of the labelled images; a bad list or too large a draw is a ConfigError."""
    labels = Labels(**{key: task.settings[key] for key in Labels.model_fields})
    index, classes = read_index(task.inputs["index"]), task.inputs["index"].read_json("classes.json")
    try:
        if labels.file:
            table = read_label_list(labels.file, labels.format, index, classes)
        else:
            assert labels.per_class is not None
            table = draw_labels(index, labels.per_class, labels.seed, classes)
    except (ValueError, OSError) as error:
        key = "labels.file" if labels.file else "labels.per_class"
        raise ConfigError(f"{key}: {error}") from error
    with task.out.writing(LABELS) as path:
        pq.write_table(table, path)
    return {"rows": table.num_rows}
