"""The digits that come with scikit-learn."""

from collections import Counter

import numpy as np
from sklearn.datasets import load_digits

from dpt_ray.data.decode import decode
from dpt_ray.data.digits import write_digits
from dpt_ray.data.index import read_bytes
from dpt_ray.data.tar import index_tar


def test_the_digits_are_those_of_scikit_learn_with_fixed_stratified_splits(root) -> None:
    table, classes = write_digits(root)
    digits = load_digits()
    assert classes == list("0123456789")
    assert table["id"].to_pylist() == [f"digit-{i:04d}" for i in range(1797)]
    assert table["label"].to_pylist() == digits.target.tolist()
    splits = table["split"].to_pylist()
    assert Counter(splits) == {"train": 997, "validation": 200, "test": 600}
    cells = Counter(zip(splits, digits.target.tolist(), strict=True))
    assert all(18 <= cells["validation", k] <= 22 for k in range(10))
    images = np.stack([np.asarray(decode(data, "L")) for data in read_bytes(table)])
    assert np.array_equal(np.rint(images / 255 * 16), digits.images)
    assert images.max() == 255
    assert set(np.unique(images)) == {round(v * 255 / 16) for v in range(17)}


def test_the_digits_are_written_the_same_every_time(tmp_path) -> None:
    first, second = (write_digits(f"{tmp_path}/{k}")[0] for k in (0, 1))
    assert first.drop(["uri"]).equals(second.drop(["uri"]))
    assert (tmp_path / "0/digits.tar").read_bytes() == (tmp_path / "1/digits.tar").read_bytes()
    assert index_tar(f"{tmp_path}/0")[0]["label"].equals(first["label"])
