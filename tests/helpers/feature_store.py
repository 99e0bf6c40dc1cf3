"""An index, features and labels in a store, of made-up clusters and without any image."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpt_ray.config.sections import Compute
from dpt_ray.data import units
from dpt_ray.data.rows import LABELS_FILE
from dpt_ray.data.shards import write_features
from dpt_ray.engine.node import Extent, Node, Task
from dpt_ray.store.artifact import Store

CLASSES = ["ash", "elm", "oak"]
SPLITS = (("train", 120), ("validation", 30), ("test", 60))
DIM = 6


def publish(out, shards, **facts):
    written = [out.publish_shard(key, ".parquet", n, write) for key, n, write in shards]
    out.publish({"shards": written, "seconds": 1.0, **facts})


def feature_store(root, labels_per_class=2, validation=True, seed=0):
    """Publishes index, features (two shards a split) and labels; the store's artifacts by name."""
    rng, store = np.random.default_rng(seed), Store(str(root))
    centres = rng.normal(0, 1.5, (len(CLASSES), DIM))
    made = {name: store.artifact(name, "0") for name in ("index", "features", "labels")}
    ids, split, truth, listed, rows = [], [], [], [], []
    for name, count in SPLITS:
        if name == "validation" and not validation:
            continue
        for part in range(2):
            n = count // 2
            label = rng.choice(len(CLASSES), n, p=(0.6, 0.25, 0.15))
            features = (centres[label] + rng.normal(0, 0.7, (n, DIM))).astype(np.float32)
            named, key = [f"{name}-{part}-{i}" for i in range(n)], f"{name}-{part}"
            ids, split, truth = [*ids, *named], [*split, *[name] * n], [*truth, *label.tolist()]
            listed.append({"shard": key, "split": name, "row_group": len(listed), "rows": n})
            rows.append((key, n, lambda path, a=named, b=features: write_features(path, a, b)))
    table = pa.table({"id": ids, "split": split, "label": pa.array(truth, pa.int32())})
    with made["index"].writing(units.INDEX) as path:
        pq.write_table(table, path)
    made["index"].write_json("classes.json", CLASSES)
    made["index"].publish({"units": listed, "classes": len(CLASSES)})
    publish(made["features"], rows, rows=len(ids), shape=[DIM])
    where = np.array([label if name == "train" else -1 for label, name in zip(truth, split, strict=True)])
    few = np.concatenate([np.flatnonzero(where == c)[:labels_per_class] for c in range(len(CLASSES))])
    labels = {"id": [ids[i] for i in few], "label": pa.array([truth[i] for i in few], pa.int32())}
    with made["labels"].writing(LABELS_FILE) as path:
        pq.write_table(pa.table(labels), path)
    made["labels"].publish({"rows": len(few)})
    return store, made


def task(stage, store, inputs, settings, name="it", images_per_class=None, **compute):
    """A task of a stage on artifacts that lie in the store under any identity."""
    nodes = {key: _Published(artifact) for key, artifact in inputs.items()}
    node = Node(name, stage, settings, nodes, Extent(images_per_class))
    out = store.artifact(stage.artifact, name, str(node.extent))
    return Task(node, settings, out, inputs, Compute(threads=1, **compute), "")


class _Published:
    """What a task reads of the node of a published artifact."""

    missing = ""

    def __init__(self, artifact):
        *_, self.artifact_name, self.digest = artifact.uri.split("/")
        self.reference = self.digest


def make(stage, store, inputs, settings, name="it", images_per_class=None, **compute):
    """Makes and publishes an artifact."""
    work = task(stage, store, inputs, settings, name, images_per_class, **compute)
    facts = stage.make(work)
    node = work.node
    known = {"version": node.version, "settings": node.hashed, "inputs": node.references}
    work.out.publish({**facts, "seconds": 1.0, **known})
    return work.out
