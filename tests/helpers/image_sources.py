"""The same ten images as a folder, tar shards, Parquet files and a manifest, local and remote."""

import csv
import io
import json

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.helpers.images import encoded, tar_of

CLASSES = ["bee", "ant"]  # not in sorted order, so that class ids must come from somewhere


# name -> (split, class name, bytes)
IMAGES = {
    f"image_{k}": (
        "train" if k < 7 else "validation",
        ["ant", "bee"][k % 2],
        encoded(np.random.default_rng(k).integers(0, 256, (5, 4, 3), np.uint8)),
    )
    for k in range(10)
}


def write(uri: str, data: bytes) -> None:
    fs, path = fsspec.core.url_to_fs(uri)
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    fs.pipe_file(path, data)


def write_folder(root: str) -> str:
    for name, (split, label, data) in IMAGES.items():
        write(f"{root}/{split.replace('validation', 'val')}/{label}/{name}.PNG", data)
    write(f"{root}/train/ant/notes.txt", b"no image")
    write(f"{root}/train/ant/.hidden.png", b"no image")
    return root


def write_tars(root: str) -> str:
    for shard in ("train-0000", "train-0001", "val-0000"):
        members = {}
        for k, (name, (split, label, data)) in enumerate(IMAGES.items()):
            if shard.startswith(split[:3]) and (split != "train" or k // 4 == int(shard[-1])):
                key = f"{'long-folder-name-' * 8}/{name}" if k == 3 else name
                members[f"{key}.png"] = data
                as_json = json.dumps({"label": label, "width": 4}).encode()
                members |= {f"{key}.json": as_json} if k % 2 else {f"{key}.cls": label.encode()}
        write(f"{root}/{shard}.tar", tar_of(members))
    return root


def write_parquets(root: str) -> str:
    feature = {"names": CLASSES, "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": feature}}})}
    for split in ("train", "validation"):
        chosen = [(n, label, data) for n, (s, label, data) in IMAGES.items() if s == split]
        images = [{"bytes": data, "path": f"{n}.png"} for n, _, data in chosen]
        labels = [CLASSES.index(label) for _, label, _ in chosen]
        table = pa.table({"image": images, "label": labels}).replace_schema_metadata(metadata)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, row_group_size=3)
        write(f"{root}/data/{split}-00000-of-00001.parquet", buffer.getvalue())
    return root


def write_manifest(root: str, rows: list[dict] | None = None) -> str:
    if rows is None:
        write_folder(f"{root}/files")
        rows = [
            {
                "uri": f"files/{s.replace('validation', 'val')}/{label}/{n}.PNG",
                "label": label,
                "split": s,
            }
            for n, (s, label, _) in IMAGES.items()
        ]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    write(f"{root}/images.csv", text.getvalue().encode())
    return f"{root}/images.csv"


WRITERS = {
    "folder": write_folder,
    "tar": write_tars,
    "parquet": write_parquets,
    "manifest": write_manifest,
}
