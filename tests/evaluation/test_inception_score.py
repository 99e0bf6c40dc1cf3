import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from dpt_ray.evaluation.inception_score import InceptionScore


def random_logits(n: int, classes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(n, classes, generator=generator, dtype=torch.float64)


def test_certain_and_balanced_predictions_score_the_number_of_classes():
    score = InceptionScore.empty(7, splits=2)
    labels = torch.arange(7).repeat_interleave(4)
    score.update(torch.eye(7)[labels], torch.arange(28))
    assert score.score() == pytest.approx((7.0, 0.0))


def test_predictions_that_ignore_the_image_score_one():
    score = InceptionScore.empty(3, splits=2)
    score.update(torch.tensor([[0.5, 0.3, 0.2]]).expand(10, 3), torch.arange(10))
    assert score.score() == pytest.approx((1.0, 0.0), abs=1e-6)


def test_streamed_score_agrees_with_torch_fidelity():
    n, splits = 103, 4
    logits = random_logits(n, 11)
    expected = isc_features_to_metric(logits, splits=splits, shuffle=False)
    # torch-fidelity's splits are runs of rows: number the images so that ours are the same.
    edges = [i * n // splits for i in range(splits + 1)]
    positions = torch.cat([torch.full((edges[i + 1] - edges[i],), i) for i in range(splits)])
    score = InceptionScore.empty(11, splits)
    for rows in torch.arange(n).split(17):
        score.update(logits[rows].softmax(dim=1), positions[rows])
    assert score.score() == pytest.approx(
        (expected["inception_score_mean"], expected["inception_score_std"]), rel=1e-10
    )


def test_score_depends_on_the_images_not_on_order_or_workers():
    probabilities, positions = random_logits(50, 5).softmax(dim=1), torch.arange(50)
    whole = InceptionScore.empty(5, splits=3)
    whole.update(probabilities, positions)
    workers = [InceptionScore.empty(5, splits=3) for _ in range(3)]
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    for worker, rows in zip(workers, shuffled.split([20, 29, 1]), strict=True):
        worker.update(probabilities[rows], positions[rows])
    merged = workers[2]
    merged.merge(workers[0])
    merged.merge(workers[1])
    assert merged.score() == pytest.approx(whole.score(), rel=1e-12)


def test_errors_name_the_value_and_the_remedy():
    score = InceptionScore.empty(3, splits=4)
    with pytest.raises(ValueError, match="apply softmax"):
        score.update(torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="rows of probabilities do not sum to 1"):
        score.update(torch.full((1, 3), torch.nan), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"pass \(n, 3\)"):
        score.update(torch.ones(2, 4) / 4, torch.tensor([0, 1]))
    score.update(torch.ones(3, 3) / 3, torch.arange(3))
    with pytest.raises(ValueError, match=r"3 rows leave one of 4 splits empty.*lower splits"):
        score.score()
    with pytest.raises(ValueError, match="same for every part"):
        score.merge(InceptionScore.empty(3, splits=2))
