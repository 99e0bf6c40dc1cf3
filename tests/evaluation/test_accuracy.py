import math

import numpy as np
import pytest
import torch
from sklearn.metrics import precision_score, recall_score, top_k_accuracy_score

from dpt_ray.evaluation.accuracy import per_class_quality, topk
from dpt_ray.evaluation.paired import binomial_stderr


def scored(n: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator)
    logits[torch.arange(n), labels] += 1
    return logits, labels


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_topk_agrees_with_scikit_learn(k):
    logits, labels = scored(300, 9)
    # scikit-learn has no k = C: everything is a hit there.
    args = {"k": k, "labels": range(9)}
    expected = 1.0 if k == 9 else top_k_accuracy_score(labels, logits, **args)
    assert topk(logits, labels, k) == pytest.approx(expected)


def test_binomial_stderr_is_the_spread_of_simulated_accuracies():
    simulated = np.random.default_rng(0).binomial(500, 0.7, size=20_000) / 500
    assert binomial_stderr(0.7, 500) == pytest.approx(simulated.std(), rel=0.03)
    assert binomial_stderr(1.0, 10) == 0.0


def test_per_class_quality_agrees_with_scikit_learn():
    logits, labels = scored(300, 6)
    pseudo = logits.argmax(dim=1)
    table = per_class_quality(pseudo, labels, 6)
    np.testing.assert_allclose(table["precision"], precision_score(labels, pseudo, average=None))
    np.testing.assert_allclose(table["recall"], recall_score(labels, pseudo, average=None))
    assert table["images"] == np.bincount(labels, minlength=6).tolist()
    assert table["pseudo_images"] == np.bincount(pseudo, minlength=6).tolist()


def test_undefined_precision_and_recall_are_not_zero():
    # Class 0 is never predicted, class 1 is half right, class 2 has no images, class 3 nothing.
    table = per_class_quality(torch.tensor([1, 1, 2]), torch.tensor([0, 1, 1]), 4)
    assert math.isnan(table["precision"][0])
    assert table["recall"][:2] == [0.0, 0.5]
    assert table["precision"][1:3] == [0.5, 0.0]
    assert math.isnan(table["recall"][2])
    assert math.isnan(table["precision"][3])
    assert [len(column) for column in table.values()] == [4] * 5


def test_errors_name_the_value_and_the_remedy():
    logits, labels = scored(10, 3)
    with pytest.raises(ValueError, match="k 5 is not between 1 and the 3 classes"):
        topk(logits, labels, 5)
    with pytest.raises(ValueError, match="n >= 1"):
        topk(logits[:0], labels[:0], 1)
    with pytest.raises(ValueError, match=r"\[-1, .*leave unlabelled rows out"):
        topk(logits, torch.cat([labels[1:], torch.tensor([-1])]), 1)
    with pytest.raises(ValueError, match="pass integers"):
        topk(logits, labels.float(), 1)
    spoilt = logits.clone()
    spoilt[4, 1] = torch.nan
    with pytest.raises(ValueError, match=r"row 4 is not finite: its features.*precision=float32"):
        topk(spoilt, labels, 1)
    with pytest.raises(ValueError, match="fraction"):
        binomial_stderr(71.0, 100)
    with pytest.raises(ValueError, match="n >= 1"):
        binomial_stderr(0.5, 0)
    with pytest.raises(ValueError, match="join by id"):
        per_class_quality(labels[:4], labels, 3)
    with pytest.raises(ValueError, match="pseudo_labels range over"):
        per_class_quality(labels + 3, labels, 3)
