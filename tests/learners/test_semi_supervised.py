import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from dpt_ray.config.semi_supervised import LearnerSettings
from dpt_ray.learners.encoder_learners import step_function
from dpt_ray.learners.labelled_mixup import batch_mixup
from dpt_ray.learners.semi_supervised import (
    StudentTeacher,
    freematch_step,
    semi_vit_step,
    supervised_first,
    supervised_step,
)
from dpt_ray.learners.weak_strong import Views, batch_views, small_image_views
from dpt_ray.training.guards import Divergence
from dpt_ray.training.loop import TrainSettings, train
from dpt_ray.training.order import batch_rows
from dpt_ray.training.random import StepRandom
from dpt_ray.training.workload import Hooks, Worker, Workload
from tests.helpers.small_training import join_two

PLAIN = Views(nn.Identity(), nn.Identity())  # so that the test knows the views
CLASSES, RATIO, SIZE, GROUP = 4, 2, 8, 8
GUARD = ("above_threshold", "class_entropy")
MIX = batch_mixup(CLASSES, GROUP)
STEPS = {
    "semi_vit": semi_vit_step(CLASSES, GROUP, threshold=0.4),
    "semi_vit_adaptive": semi_vit_step(CLASSES, GROUP, threshold=None),
    "freematch": freematch_step(GROUP),
    # Two supervised steps, then Semi-ViT's, with mixed labelled images in both.
    "semi_vit_after_supervised": supervised_first(
        2, supervised_step(MIX), semi_vit_step(CLASSES, GROUP, threshold=None, mix=MIX)
    ),
}
SHARED = (
    "semi_vit_adaptive",
    "freematch",
    "semi_vit_after_supervised",
)  # by two processes: what communicates


def drawn(
    given: dict[str, torch.Tensor], random: StepRandom, views: Views = PLAIN
) -> dict[str, torch.Tensor]:
    """The views of a batch, those of the labelled images strong."""
    return batch_views(views, views.strong)(given, random)


def model(seed: int = 0, supervised_steps: int = 0) -> StudentTeacher:
    student = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, CLASSES))
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(student[1].weight, std=0.2, generator=generator)
    nn.init.zeros_(student[1].bias)
    return StudentTeacher(student, CLASSES, 0.9, 0.5, supervised_steps)


def batch(n: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def images(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, (*shape, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)

    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    return {"image": images(n), "unlabelled": images(n, RATIO), "label": labels}


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def pixels(images: torch.Tensor) -> np.ndarray:
    return images.numpy().reshape(-1, 3 * SIZE**2).astype(np.float64) / 127.5 - 1


def weights(of: StudentTeacher) -> np.ndarray:
    return of.student[1].weight.detach().numpy().T.astype(np.float64)


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return -(targets * np.log(softmax(logits))).sum(1)


def supervised(of: StudentTeacher, given: dict[str, torch.Tensor], smoothing: float = 0.1) -> float:
    targets = np.eye(CLASSES)[given["label"]] * (1 - smoothing) + smoothing / CLASSES
    return cross_entropy(pixels(given["image"]) @ weights(of), targets).mean()


@pytest.mark.parametrize("threshold", [0.6, None])
def test_semi_vits_loss_is_the_formula(threshold):
    of, given = model(), batch()
    of.threshold.prediction.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    of.threshold.level.fill_(0.8)
    tau = np.array([0.8, 0.6, 0.4, 0.2]) if threshold is None else np.full(CLASSES, threshold)
    x, random = pixels(given["unlabelled"]), StepRandom(0, 3, 0, 16)
    p = softmax(x @ weights(of))
    o, y = p.max(1), p.argmax(1)
    keys = random.uniform("partner", (RATIO,)).numpy().reshape(-1, GROUP * RATIO)
    pi = np.concatenate([i * GROUP * RATIO + k.argsort() for i, k in enumerate(keys)])
    lam = (o / (o + o[pi]))[:, None]
    smooth = np.eye(CLASSES)[y] * 0.9 + 0.1 / CLASSES
    loss = cross_entropy((lam * x + (1 - lam) * x[pi]) @ weights(of), lam * smooth + (1 - lam) * smooth[pi])
    above = np.maximum(o / tau[y], (o / tau[y])[pi]) >= 1
    assert 0 < above.sum() < len(above) or threshold is None
    expected = supervised(of, given) + 5 * (above * loss).mean()
    step = semi_vit_step(CLASSES, GROUP, threshold, unlabelled_weight=5, cutmix=0)
    assert step(of, drawn(given, random), random).item() == pytest.approx(expected, rel=1e-5)
    log = of.extra_log()
    assert log["above_threshold"].item() == pytest.approx((o >= tau[y]).mean())
    mean = p.mean(0)
    assert log["class_entropy"].item() == pytest.approx(-(mean * np.log(mean)).sum() / np.log(CLASSES))


def test_freematchs_loss_is_the_formula():
    of, given = model(), batch()
    prediction, histogram = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
    of.threshold.prediction.copy_(torch.tensor(prediction))
    of.threshold.histogram.copy_(torch.tensor(histogram))
    of.threshold.level.fill_(0.9)
    logits = pixels(given["unlabelled"]) @ weights(of)
    q = softmax(logits)
    sure = q.max(1) >= (prediction / 0.4 * 0.9)[q.argmax(1)]
    assert 0 < sure.sum() < len(sure)
    unlabelled = (sure * cross_entropy(logits, np.eye(CLASSES)[q.argmax(1)])).mean()
    fair = []
    for part, which in zip(q.reshape(2, -1, CLASSES), sure.reshape(2, -1), strict=True):
        counts = np.bincount(part[which].argmax(1), minlength=CLASSES) / which.sum()
        found = np.divide(part[which].mean(0), counts, out=np.zeros(CLASSES), where=counts > 0)
        target = prediction / histogram / (prediction / histogram).sum()
        fair.append((target * np.log(found / found.sum() + 1e-12)).sum())
    expected = supervised(of, given, smoothing=0) + 2 * unlabelled + 0.5 * np.mean(fair)
    step, random = freematch_step(GROUP, unlabelled_weight=2, fairness_weight=0.5), StepRandom(0, 3, 0, 16)
    assert step(of, drawn(given, random), random).item() == pytest.approx(expected, rel=1e-5)
    assert of.extra_log()["above_threshold"].item() == pytest.approx(sure.mean())


def test_mixed_labelled_images_enter_the_losses_with_their_soft_targets():
    of, given, random = model(), batch(), StepRandom(0, 3, 0, 16)
    images, targets = MIX(given["image"].float() / 127.5 - 1, given["label"], random)
    logits = images.numpy().reshape(16, -1).astype(np.float64) @ weights(of)
    expected = cross_entropy(logits, targets.numpy()).mean()
    seen = drawn(given, random)
    assert supervised_step(MIX)(of, seen, random).item() == pytest.approx(expected, rel=1e-5)
    plain, mixed = (
        semi_vit_step(CLASSES, GROUP, threshold=0.4, mix=how)(of, seen, random).item() for how in (None, MIX)
    )
    assert mixed - plain == pytest.approx(expected - supervised(of, given), rel=1e-4)


def test_a_supervised_step_needs_no_unlabelled_images_and_moves_no_threshold():
    of, given, random = model(), batch(), StepRandom(0, 3, 0, 16)
    del given["unlabelled"]
    loss = supervised_step()(of, drawn(given, random), random)
    assert loss.item() == pytest.approx(supervised(of, given), rel=1e-5)
    assert of.extra_log() == {}
    before = copy.deepcopy(of.threshold.state_dict())
    of.before_step(1)
    assert all(torch.equal(value, before[key]) for key, value in of.threshold.state_dict().items())


def test_the_first_steps_are_supervised():
    chosen = supervised_first(2, lambda *_: "supervised", lambda *_: "then")
    assert [chosen(None, {}, StepRandom(0, step, 0, 8)) for step in range(4)] == [
        *("supervised", "supervised", "then", "then")
    ]


@pytest.mark.parametrize(("mixup", "first"), [(False, None), (True, MIX), ("after_supervised", None)])
def test_labelled_images_are_mixed_in_all_steps_or_after_the_supervised_ones(mixup, first):
    steps = {"steps": 4, "supervised_steps": 2, "batch_size": 16, "group": GROUP, "learning_rate": 1e-3}
    settings = LearnerSettings(method="semi_vit", mixup=mixup, threshold=0.4, unlabelled_weight=5.0, **steps)
    of, given, step = model(), batch(), step_function(settings, CLASSES)
    then = semi_vit_step(CLASSES, GROUP, threshold=0.4, mix=MIX if mixup else None)
    for number, expected in ((1, supervised_step(first)), (2, then)):
        random = StepRandom(0, number, 0, 16)
        seen = drawn(given, random)
        assert step(of, seen, random).item() == expected(of, seen, random).item()


@pytest.mark.parametrize(("prediction", "entropy"), [([1.0, 0, 0, 0], 0.0), ([0.25] * 4, 1.0)])
def test_the_guard_tells_one_class_from_all(prediction, entropy):
    of = model()
    of.observe(torch.tensor([prediction] * 8), torch.arange(8) < 6)
    of.observe(torch.tensor([prediction] * 8), torch.zeros(8, dtype=torch.bool))  # an accumulated part
    log = {name: value.item() for name, value in of.extra_log().items()}
    assert log == {"above_threshold": 6 / 16, "class_entropy": pytest.approx(entropy)}


@pytest.mark.parametrize("name", STEPS)
def test_two_workers_losses_and_observations_are_those_of_one(name):
    given, views = batch(), small_image_views(SIZE)

    def loss(of, lo, hi):
        random = StepRandom(0, 3, lo, hi)
        part = {key: value[lo:hi] for key, value in given.items()}
        return STEPS[name](of, drawn(part, random, views), random)

    one, two = model(), model()
    whole, halves = loss(one, 0, 16), [loss(two, lo, lo + 8) for lo in (0, 8)]
    torch.testing.assert_close(whole, sum(halves) / 2, rtol=1e-5, atol=0)
    torch.testing.assert_close(one.pending, two.pending)


def test_the_teacher_is_the_average_and_gets_no_gradient():
    of = model()
    first = copy.deepcopy(of.student.state_dict())
    with torch.no_grad():
        of.student[1].weight += 1
    of.observe(torch.full((8, CLASSES), 1 / CLASSES), torch.ones(8, dtype=torch.bool))
    of.before_step(1)
    torch.testing.assert_close(of.teacher[1].weight, first["1.weight"] + 0.1)
    assert not any(p.requires_grad for p in of.teacher.parameters())
    assert not of.train().teacher.training
    assert of.student.training
    assert of.pending.tolist() == [0] * len(of.pending)


def test_the_teacher_starts_from_what_the_supervised_steps_have_made():
    of = model(supervised_steps=2)
    for step in range(1, 4):
        with torch.no_grad():
            of.student[1].weight += 1
        before = copy.deepcopy(of.teacher[1].weight)
        of.before_step(step)
        followed = of.student[1].weight if step <= 2 else 0.9 * before + 0.1 * of.student[1].weight
        torch.testing.assert_close(of.teacher[1].weight, followed.detach(), rtol=1e-6, atol=1e-6)


def test_a_prediction_that_is_no_number_does_not_reach_the_thresholds():
    of = model()
    odd = torch.full((8, CLASSES), 1 / CLASSES)
    odd[3, 1] = torch.nan
    of.observe(odd, torch.ones(8, dtype=torch.bool))
    of.before_step(1)
    assert of.threshold.thresholds().isfinite().all() and not of.extra_log()


def test_a_loss_that_rises_as_pseudo_labels_pass_is_no_divergence():
    limit = LearnerSettings(steps=9, batch_size=16, learning_rate=1e-3, method="semi_vit").diverged_above
    guard = Divergence(limit)
    for step, loss in enumerate([2.3, *[0.6] * 20, *[8.0] * 20]):
        guard.add(step, loss)


def trained(name: str, resume=None, rank: int = 0, workers: int = 1, **more):
    """Six steps on 32 images: the averages, the checkpoint of each step, and the log."""
    first = 2 if name == "semi_vit_after_supervised" else 0
    of, checkpoints, logs, views = model(supervised_steps=first), {}, [], small_image_views(SIZE)
    given, prepare = batch(32), batch_views(views, views.weak if name == "freematch" else views.strong)

    def load(rows, step):
        return {key: value[torch.from_numpy(rows.copy())] for key, value in given.items()}

    def keep(step, tensors, meta):
        checkpoints[step] = tensors, meta

    net = DistributedDataParallel(of) if workers > 1 else of
    of_model = {"before_step": of.before_step, "extra_log": of.extra_log}
    workload = Workload(net, STEPS[name], load, 32, prepare=prepare, copied_steps=first, **of_model, **more)
    settings = TrainSettings(6, 16, 1e-2, checkpoint_every=1, ema_decay=0.9, log_every=1)
    result = train(workload, settings, Worker(rank, workers), Hooks(logs.append, keep), resume)
    return result.ema, checkpoints, [{key: r[key] for key in GUARD if key in r} for r in logs]


@pytest.mark.parametrize("name", STEPS)
def test_a_resumed_training_is_bit_identical_to_one_that_never_stopped(name):
    assert len(batch_rows(0, 0, 16, 32)) == 16
    expected, checkpoints, logs = trained(name)
    found, after, logs_after = trained(name, checkpoints[3])
    assert logs_after == logs[3:]
    assert all(set(log) == set(GUARD) for log in logs_after)
    assert list(after) == [4, 5, 6]
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(torch.equal(after[6][0][key], value) for key, value in checkpoints[6][0].items())
    # The thresholds have moved, so the checkpoint had to hold them.
    assert checkpoints[3][0]["model.threshold.level"] != checkpoints[6][0]["model.threshold.level"]


@pytest.mark.parametrize("name", STEPS)
def test_views_drawn_ahead_by_processes_are_those_of_the_thread_that_trains(name):
    expected, _, logs = trained(name)
    found, _, found_logs = trained(name, load_processes=2)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert found_logs == logs


def one_of_two(rank: int, folder: str) -> None:
    join_two(rank, folder)
    for name in SHARED:
        _, checkpoints, logs = trained(name, rank=rank, workers=2)
        if rank == 0:
            save_file(checkpoints[6][0], f"{folder}/{name}.safetensors")
            Path(folder, f"{name}.json").write_text(json.dumps(logs))
    distributed.destroy_process_group()


def test_two_processes_train_as_one_with_equal_teacher_and_thresholds(tmp_path):
    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    for name in SHARED:
        found = load_file(tmp_path / f"{name}.safetensors")
        _, checkpoints, logs = trained(name)
        expected = checkpoints[6][0]
        assert json.loads((tmp_path / f"{name}.json").read_text()) == [pytest.approx(log) for log in logs]
        for key in (key for key in expected if key.startswith(("model.", "ema."))):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STEPS)
def test_the_loops_average_of_the_student_is_the_teacher_after_the_last_step(name):
    expected, checkpoints, _ = trained(name)
    of = model()
    last = {key.removeprefix("model."): v for key, v in checkpoints[6][0].items() if key.startswith("model.")}
    of.load_state_dict(last)
    of.before_step(6)
    for key, value in of.teacher.state_dict().items():
        torch.testing.assert_close(value, expected[f"student.{key}"])


def test_a_decay_outside_zero_and_one_is_refused():
    with pytest.raises(ValueError, match="ema_decay 1"):
        StudentTeacher(nn.Linear(2, 2), 2, 1.0)
