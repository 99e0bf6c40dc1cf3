"""The linear classifier as it is saved and applied (numpy alone: light workers load no torch)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpt_ray.data.rows import Rows
from dpt_ray.store.artifact import Artifact

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
HEAD = "classifier/"  # the folder, in that of an encoder, of the classifier that was trained with it


def logits(features: np.ndarray, W: np.ndarray) -> np.ndarray:
    """Decision values (n, C) of row-normalised features (n, dim) and weights (C, dim)."""
    return features @ W.T


def probabilities(features: np.ndarray, W: np.ndarray, temperature: float) -> np.ndarray:
    """Return softmax(W f / T) (n, C) of row-normalised features (n, dim) and weights (C, dim)."""
    from scipy.special import softmax

    found: np.ndarray = softmax(logits(features, W) / temperature, axis=1)
    return found


def accuracy(W: np.ndarray, rows: Rows) -> float | None:
    """Return the share of rows whose largest decision value is that of their label; None without rows."""
    if not len(rows):
        return None
    return float((logits(rows.features, W).argmax(1) == rows.labels).mean())


def negative_log_likelihood(W: np.ndarray, rows: Rows) -> float | None:
    """Return the mean cross-entropy of rows in double precision; None without rows."""
    return cross_entropy(logits(rows.features, W), rows.labels) if len(rows) else None


def cross_entropy(decisions: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean cross-entropy of decision values (n, C), n at least 1, in double precision."""
    from scipy.special import log_softmax

    scores = log_softmax(decisions.astype(np.float64), axis=1)
    return float(-scores[np.arange(len(labels)), labels].mean())


def save_classifier(
    out: Artifact, weights: np.ndarray, classes: Sequence[str], facts: Mapping[str, Any], prefix: str = ""
) -> None:
    """Publish `model.safetensors` (weight: classes x features) and `config.json` under `prefix`."""
    config = {
        "kind": "multinomial logistic regression on row-normalised features, no intercept",
        "num_classes": len(classes),
        "classes": list(classes),
        **facts,
    }

    def write(folder: Path) -> None:
        save_weights(folder / WEIGHTS, weights)
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")

    out.publish_files(write, prefix)


def save_weights(path: Path, weights: np.ndarray) -> None:
    """Write the weights (C, dim) of a classifier."""
    from safetensors.numpy import save_file

    save_file({"weight": weights}, path)


def load_classifier(classifier: Artifact, prefix: str = "") -> np.ndarray:
    """Return the weights (C, dim) of a published classifier."""
    return load_weights(classifier.local_file(prefix + WEIGHTS))


def load_weights(path: Path) -> np.ndarray:
    """Return the weights (C, dim) in a file."""
    from safetensors.numpy import load_file

    return load_file(path)["weight"]
