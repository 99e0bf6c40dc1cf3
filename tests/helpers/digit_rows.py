"""Rows of pictures for a report."""

import numpy as np
from sklearn.datasets import load_digits

from dpt_ray.report.page import GridRow


def digit_rows(n: int) -> list[GridRow]:
    """The bundled digits; the "generated" ones are other real ones with noise."""
    digits = load_digits()
    noise = np.random.default_rng(0)

    def picture(image: np.ndarray) -> np.ndarray:
        return np.clip(image * 15.9, 0, 255).astype(np.uint8)[..., None]

    rows = []
    for label in range(10):
        mine = digits.images[digits.target == label]
        noisy = mine[n : 2 * n] + noise.normal(0, 1, (n, 8, 8))
        rows.append(GridRow(str(label), [picture(x) for x in mine[:n]], [picture(x) for x in noisy]))
    return rows
