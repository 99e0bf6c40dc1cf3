"""The grid of pictures, to the pixel."""

import io

import numpy as np
import pytest
from PIL import Image

from dpt_ray.report.page import GridRow
from dpt_ray.report.pictures import grid_png, scale_to


def test_grid_places_images_blocks_and_gutters_to_the_pixel() -> None:
    def flat(value: int) -> np.ndarray:
        return np.full((2, 3, 1), value, np.uint8)

    rows = [
        GridRow("a", [flat(10), flat(20)], [flat(30)]),
        GridRow("b", [flat(40)], [flat(50)]),
    ]
    grid = np.asarray(Image.open(io.BytesIO(grid_png(rows, scale=5, gutter=4))))
    # Cells of 15 x 10: 4 + 15 + 4 + 15 + (4 gutters) 16 + 15 + 4 wide, 4 + 10 + 4 + 10 + 4 high.
    assert grid.shape == (32, 73, 3)
    expected = np.full((32, 73), 255)
    expected[4:14, 4:19] = 10
    expected[4:14, 23:38] = 20
    expected[4:14, 54:69] = 30
    expected[18:28, 4:19] = 40
    expected[18:28, 54:69] = 50
    assert (grid == expected[..., None]).all()


def test_grid_magnifies_pixels_to_squares_and_keeps_colours() -> None:
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    grid = np.asarray(Image.open(io.BytesIO(grid_png([GridRow("a", [], [image])], 3, 1))))
    assert grid.shape == (8, 8, 3)
    assert (grid[1:7, 1:7] == np.kron(image, np.ones((3, 3, 1), np.uint8))).all()
    edge = np.ones((8, 8), bool)
    edge[1:7, 1:7] = False
    assert (grid[edge] == 255).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 9, 3), np.uint8), "crop and resize"),
        (np.zeros((8, 8, 3), np.float32), "float32"),
        (np.zeros((8, 8), np.uint8), r"\(8, 8\)"),
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\)"),
    ],
)
def test_grid_refuses_images_it_cannot_place_and_names_the_class(image: np.ndarray, message: str) -> None:
    row = GridRow("cat", [np.zeros((8, 8, 3), np.uint8)], [image])
    with pytest.raises(ValueError, match=rf"'cat'.*{message}"):
        grid_png([row], 1, 1)


def test_images_are_magnified_by_whole_numbers_and_never_shrunk() -> None:
    def row(side: int) -> list[GridRow]:
        return [GridRow("a", [np.zeros((side, side, 3), np.uint8)], [])]

    assert [scale_to(row(side), 48) for side in (8, 32, 47, 256)] == [6, 1, 1, 1]
