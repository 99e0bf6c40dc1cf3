"""Draws at random that depend on the seed and the image alone: splits of an index."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from dpt_ray.data.index import SCHEMA


def draw_key(seed: int, identifier: str) -> int:
    """Return a 64-bit number that is random in (seed, id): sorting by it draws at random.

    It depends on nothing else, so a draw does not change with the order of the rows.
    """
    digest = hashlib.blake2b(f"{seed}:{identifier}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def stratified_split(labels: Sequence[int], sizes: Mapping[str, int], seed: int) -> list[str]:
    """Return a split name for each label: exactly sizes[name] of them, every class in proportion.

    The sequence of splits is spread evenly along the images sorted by class (random within one), so
    each class gets its share of every split to within 2 images. Raises ValueError unless the sizes
    add up to the number of labels.
    """
    if sum(sizes.values()) != len(labels) or min(sizes.values()) < 0:
        raise ValueError(f"split sizes {dict(sizes)} must add up to the {len(labels)} images")
    by_class = sorted(range(len(labels)), key=lambda i: (labels[i], draw_key(seed, str(i))))
    places = [((j + 0.5) / size, name) for name, size in sizes.items() for j in range(size)]
    splits = [""] * len(labels)
    for i, (_, name) in zip(by_class, sorted(places), strict=True):
        splits[i] = name
    return splits


def assign_splits(
    table: pa.Table, validation: int, test: int, seed: int, keep_in_train: Collection[str] = ()
) -> pa.Table:
    """Return the index with that many labelled training images, drawn by id, moved to each split.

    Ids in `keep_in_train` (those of label lists, say) are not drawn. Raises ValueError where the
    source already has the split or has too few labelled images.
    """
    present = set(pc.unique(table["split"]).to_pylist())
    for name, count in (("validation", validation), ("test", test)):
        if count and name in present:
            raise ValueError(f"{name} is {count} but the source already has a {name} split; use 0")
    can_move = pc.and_(pc.equal(table["split"], "train"), pc.is_valid(table["label"]))
    kept = pc.is_in(table["id"], value_set=pa.array(sorted(keep_in_train), pa.string()))
    ids = table["id"].filter(pc.and_(can_move, pc.invert(kept))).to_pylist()
    if validation + test > len(ids):
        raise ValueError(
            f"validation {validation} + test {test} is more than the {len(ids)} labelled training "
            "images that may be drawn; lower them"
        )
    drawn = sorted(ids, key=lambda i: draw_key(seed, i))[: validation + test]
    splits = table["split"]
    for name, chosen in (("validation", drawn[:validation]), ("test", drawn[validation:])):
        moved = pc.is_in(table["id"], value_set=pa.array(chosen, pa.string()))
        splits = pc.if_else(moved, name, splits)
    return table.set_column(4, SCHEMA.field("split"), splits)
