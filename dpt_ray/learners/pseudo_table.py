"""The table of pseudo-labels, and the temperature of its confidences (Guo et al. 2017, arXiv 1706.04599)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from dpt_ray.data.rows import row_normalise
from dpt_ray.learners.linear_classifier import probabilities
from dpt_ray.store.records import Calibration

TOP = 5


def pseudo_label_table(
    ids: pa.ChunkedArray | pa.Array,
    split: str,
    raw: np.ndarray,
    W: np.ndarray,
    temperature: float,
    classes: Sequence[str],
) -> pa.Table:
    """Return label, confidence and the five best classes of features `raw` (n, dim), not normalised yet."""
    probs = probabilities(row_normalise(raw), W, temperature)
    best = np.argsort(-probs, axis=1, kind="stable")[:, :TOP]
    scores = np.take_along_axis(probs, best, axis=1)
    return pa.table(
        {
            "id": ids,
            "split": pa.array([split] * len(best)),
            "label": pa.array(best[:, 0].astype(np.int32)),
            "class_name": pa.array(np.array(classes)[best[:, 0]]),
            "confidence": pa.array(scores[:, 0]),
            "top5": pa.array(best.astype(np.int32).tolist(), pa.list_(pa.int32())),
            "top5_confidence": pa.array(scores.tolist(), pa.list_(pa.float32())),
        }
    )


def calibrate(decisions: np.ndarray, labels: np.ndarray) -> Calibration:
    """Return the temperature of decisions (n, C), and the calibration error before and after it.

    The rows must not have been fitted on. Without any the temperature is 1.
    """
    import torch

    from dpt_ray.evaluation.calibration import (
        expected_calibration_error,
        fit_temperature,
        reliability_bins,
    )

    if not len(labels):
        return {"temperature": 1.0, "n": 0}
    found, truth = torch.from_numpy(decisions), torch.from_numpy(labels)
    temperature = fit_temperature(found, truth)

    def quality(at: float) -> tuple[float, list[tuple[float, float, int]]]:
        probs = (found / at).softmax(1)
        bins = reliability_bins(probs, truth)
        filled = zip(bins.confidence.tolist(), bins.accuracy.tolist(), bins.counts.tolist(), strict=True)
        return expected_calibration_error(probs, truth), [row for row in filled if row[2]]

    ece_before, bins_before = quality(1.0)
    ece_after, bins_after = quality(temperature)
    return {
        "temperature": temperature,
        "n": len(labels),
        "ece_before": ece_before,
        "bins_before": bins_before,
        "ece_after": ece_after,
        "bins_after": bins_after,
    }
