"""The denoiser's training in this process, on a handful of hand-made latents: guards and bad input."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dpt_ray.config import ConfigError
from dpt_ray.data.moments import MomentsReader, read_moment_ids
from dpt_ray.data.shards import write_moments
from dpt_ray.engine.execute import StageError
from dpt_ray.stages import denoiser
from dpt_ray.stages.denoiser import Denoiser
from dpt_ray.store import cache
from dpt_ray.training.log import read_log
from tests.helpers.latents import CLASSES, ROWS, make_latents, same, weights


@pytest.fixture
def latents(tmp_path):
    return make_latents(tmp_path)


@pytest.fixture
def poisoned(monkeypatch):
    """Multiplies the moments of steps chosen by `bad(step, attempt)`; counts the attempts at each."""
    attempts = {}

    def poison(bad, factor=np.nan):
        from dpt_ray.training import loop

        original = loop.prefetch

        def poisoning(load, *given):
            def loaded(step):
                attempts[step] = attempts.get(step, 0) + 1
                batch = load(step)
                return batch | {"moments": batch["moments"] * factor} if bad(step, attempts[step]) else batch

            return original(loaded, *given)

        monkeypatch.setattr(loop, "prefetch", poisoning)
        return attempts

    return poison


def test_a_loss_that_stays_not_finite_is_rolled_back_once_and_then_stops_the_stage(latents, poisoned):
    attempts = poisoned(lambda step, attempt: step >= 6)
    task = latents.task("diffusion.steps=30", "diffusion.checkpoint_every=2")
    with pytest.raises(StageError, match=r"not finite at step 16, the last of 10 in a row, after a rollback"):
        Denoiser.make(task)
    assert attempts[5] == 1 and attempts[6] == attempts[15] == 2  # back to the last step that was good
    assert task.out.read_json("rollback.json") == {"from": 16, "to": 6}
    assert not task.out.exists("model.safetensors")
    with pytest.raises(StageError, match="after a rollback"):  # the one rollback stays spent
        Denoiser.make(task)
    assert attempts[6] == 3


def test_a_loss_that_stays_far_too_high_is_rolled_back_once_and_then_stops_the_stage(latents, poisoned):
    attempts = poisoned(lambda step, attempt: step >= 6, factor=1e3)
    task = latents.task("diffusion.steps=30", "diffusion.checkpoint_every=2", "diffusion.log_every=1")
    with pytest.raises(StageError, match=r"at step 16, the last of 10 logged .* after a rollback: lower"):
        Denoiser.make(task)
    assert attempts[5] == 1 and attempts[6] == attempts[15] == 2  # no checkpoint of the high losses
    assert task.out.read_json("rollback.json") == {"from": 16, "to": 6}
    with pytest.raises(StageError, match="after a rollback"):
        Denoiser.make(latents.task("diffusion.steps=30", "diffusion.log_every=1"))
    task = latents.task("diffusion.steps=30", "diffusion.log_every=1", "diffusion.diverged_above=1e30")
    Denoiser.make(task)  # the same artifact, for those who know better


def test_a_rollback_that_helps_gives_the_undisturbed_weights_and_is_in_the_log(latents, poisoned):
    expected = latents.make("diffusion.steps=20")
    log, whole = read_log(expected.out), weights(expected)
    expected.out.fs.rm(expected.out.path(""), recursive=True)

    poisoned(lambda step, attempt: 5 <= step < 15 and attempt == 1)
    task = latents.make("diffusion.steps=20")
    assert same(weights(task), whole)
    again = read_log(task.out)
    assert [record["loss"] for record in again] == [record["loss"] for record in log]
    assert {r["step"]: r["rolled_back_from"] for r in again if "rolled_back_from" in r} == {6: 15}


def test_a_loss_not_finite_before_the_first_checkpoint_stops_the_stage(latents):
    with pytest.raises(StageError, match="before the first checkpoint: lower learning_rate") as error:
        latents.make(
            "diffusion.learning_rate=1e30", "diffusion.warmup_steps=0", "diffusion.checkpoint_every=99"
        )
    assert "\n" not in str(error.value)


def test_a_bad_last_step_is_in_the_log_and_the_training_is_published(latents, poisoned, monkeypatch):
    monkeypatch.setattr("dpt_ray.training.log.TrainingLog.EVERY", float("inf"))  # only what is flushed
    poisoned(lambda step, attempt: step == 11)
    manifest = latents.make("diffusion.steps=12").out.manifest
    records = read_log(latents.task("diffusion.steps=12").out)
    assert [record["step"] for record in records] == [2, 4, 6, 8, 10, 12]
    assert np.isnan(records[-1]["loss"]) and records[-1]["skipped_steps"] == 1
    assert manifest["loss"] == records[-2]["loss"]


def test_a_gpu_that_is_too_small_is_told_in_one_line_naming_what_to_set(latents, monkeypatch):
    def full(*arguments, **more):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr("dpt_ray.training.loop.train", full)
    with pytest.raises(StageError) as error:
        latents.make()
    for word in ("compute.gradient_accumulation", "diffusion.batch_size", "Tried to allocate 2 GiB"):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_model_is_refused_naming_the_keys(latents):
    other = latents.make("diffusion.model.dim=32")
    task = latents.task()
    task.out.fs.copy(other.out.path("checkpoints"), task.out.path("checkpoints"), recursive=True)
    with pytest.raises(StageError, match=r"checkpoint does not fit this model: .*differing: ema\.") as error:
        Denoiser.make(task)
    assert "\n" not in str(error.value)


def test_an_image_without_a_label_is_named_before_training(latents):
    latents.label([row % CLASSES for row in range(ROWS - 2)])
    task = latents.task()
    with pytest.raises(ConfigError, match="2 images have no label, the first is image-38"):
        Denoiser.make(task)
    assert not task.out.exists("started.json")


def test_a_class_without_images_is_named_before_training(latents):
    latents.label([row % (CLASSES - 1) for row in range(ROWS)])
    task = latents.task()
    with pytest.raises(ConfigError, match="no training image has the pseudo-label class-3"):
        Denoiser.make(task)
    assert not task.out.exists("started.json")


def test_tensorboard_shows_the_curves_of_the_log_and_a_resumed_training_doubles_none(latents, poisoned):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    poisoned(lambda step, attempt: 5 <= step < 15 and attempt == 1)  # a rollback: records are cut
    task = latents.make("diffusion.steps=20")
    log = read_log(task.out)
    events = EventAccumulator(task.out.path("tensorboard")).Reload()
    curve = [(event.step, event.value) for event in events.Scalars("training/loss")]
    assert [step for step, _ in curve] == [record["step"] for record in log] == list(range(2, 21, 2))
    assert [value for _, value in curve] == pytest.approx([record["loss"] for record in log])


def test_mfu_is_the_counted_flops_over_the_measured_peak(latents, monkeypatch):
    monkeypatch.setattr("dpt_ray.training.throughput.matmul_peak", lambda device, dtype: 1e9)
    task = latents.make()
    # By hand, multiply-adds of one forward pass: 4 patches and 2 tokens of 16 numbers, 3 blocks.
    tokens, dim, patch = 6, 16, 4
    block = tokens * (3 * dim**2 + dim**2 + 8 * dim**2) + 2 * tokens**2 * dim + 6 * dim**2
    other = tokens * 2 * dim**2 + 2 * 4 * patch * dim + 3 * 3 * 16 + 2 * dim**2 + 2 * dim**2
    forward = 2 * (3 * block + other)
    for record in read_log(task.out):
        assert record["mfu"] == pytest.approx(3 * forward * record["images_per_s"] / 1e9)
    assert task.out.read_json("started.json")["matmul_flops_per_s"] == 1e9


# Starting points ---------------------------------------------------------------------------------


def test_more_steps_of_a_finished_training_go_on_from_it_to_the_same_bits(latents):
    whole = latents.make("diffusion.steps=17")
    expected, log = weights(whole), read_log(whole.out)
    whole.out.fs.rm(whole.out.path(""), recursive=True)
    short = latents.make("diffusion.steps=9")
    task = latents.make("diffusion.steps=17")
    assert task.out.manifest["continued_from"] == short.node.digest
    assert task.out.manifest["continued_at_step"] == 9
    assert same(weights(task), expected)
    again = read_log(task.out)
    for column in ("step", "loss", "lr", "grad_norm"):
        assert [record[column] for record in again] == [record[column] for record in log]


def test_what_differs_in_more_than_its_steps_is_not_continued(latents):
    latents.make("diffusion.steps=4", "diffusion.seed=1")
    latents.make("diffusion.steps=12")  # more steps, not fewer
    assert "continued_from" not in latents.make("diffusion.steps=8").out.manifest


def test_a_cosine_schedule_is_trained_anew_with_more_steps_and_says_so(latents):
    latents.make("diffusion.steps=4", "diffusion.lr_schedule=cosine")
    manifest = latents.make("diffusion.steps=8", "diffusion.lr_schedule=cosine").out.manifest
    assert "continued_from" not in manifest
    assert "lr_schedule cosine depends on steps" in manifest["not_continued"]


# A training whose one step changes nothing.
STILL = ("diffusion.learning_rate=1e-30", "diffusion.weight_decay=0", "diffusion.steps=1", "diffusion.seed=5")


def test_training_starts_from_given_weights(latents):
    first = latents.make()
    for source in (first.out.path("").rstrip("/"), first.out.path("model.safetensors")):
        task = latents.make(*STILL, f"diffusion.init_from={source}")
        for key, value in weights(first).items():
            torch.testing.assert_close(weights(task)[key], value, rtol=0, atol=1e-12)
        assert not task.out.exists("initial.safetensors")
        task.out.fs.rm(task.out.path(""), recursive=True)


def test_given_weights_of_another_number_of_classes_keep_all_but_the_classes_rows(latents, tmp_path):
    from dpt_ray.models.uvit import UViT, UViTConfig

    config = UViTConfig(4, 2, 1, dim=16, depth=2, heads=2, num_classes=7)
    given = UViT(config).state_dict()
    (tmp_path / "published").mkdir()
    torch.save(given, tmp_path / "published" / "nnet_ema.pth")
    task = latents.make(
        *STILL, f"diffusion.init_from={tmp_path}/published", "diffusion.model.modulation=false"
    )
    found = weights(task)
    table = found.pop("label_emb.weight")
    old = given.pop("label_emb.weight")
    assert table.shape == (CLASSES + 1, 16)
    torch.testing.assert_close(table[-1], old[-1], rtol=0, atol=1e-12)  # the null class
    for key, value in given.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-12)


def test_the_content_of_given_weights_decides_the_identity_not_where_they_lie(latents, tmp_path):
    digests = [latents.task().node.digest]
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
        digests.append(latents.task(f"diffusion.init_from={tmp_path / name}").node.digest)
    assert digests[1] == digests[2]
    assert len(set(digests)) == 3
    with pytest.raises(ConfigError, match=r"diffusion.init_from: .*none of model.safetensors"):
        assert latents.task(f"diffusion.init_from={tmp_path}").node.digest


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("diffusion.model.depth=4", "missing .*in_blocks.1."),
        ("diffusion.model.dim=32", "of another shape .*"),
        ("diffusion.model.modulation=false", "12 unexpected .*condition_time.0.bias"),
        ("diffusion.model.heads=4", "made with heads 2; set diffusion.model.heads to it, not 4"),
    ],
)
def test_given_weights_of_another_network_are_refused_key_by_key(latents, override, message):
    source = latents.make().out.path("model.safetensors")
    task = latents.task(override, f"diffusion.init_from={source}")
    with pytest.raises(ConfigError, match=f"diffusion.init_from: .*{message}"):
        Denoiser.make(task)
    assert not task.out.exists("started.json")


# Options -----------------------------------------------------------------------------------------


def test_pseudo_labels_below_the_confidence_train_the_null_class(latents):
    # Row r has confidence 1 - r/100: rows 0..20 are at least 0.795.
    task = latents.task("diffusion.min_confidence=0.795")
    labels, counts = denoiser._labels(task)
    assert labels.tolist() == [row % CLASSES if row <= 20 else CLASSES for row in range(ROWS)]
    assert list(counts.values()) == [6, 5, 5, 5]
    assert latents.make("diffusion.min_confidence=0.795").out.manifest["null_labels"] == 19
    task = latents.task("diffusion.min_confidence=0.985")
    with pytest.raises(ConfigError, match=r"class-2, class-3 .*lower min_confidence 0.985"):
        Denoiser.make(task)


def test_a_shuffle_in_windows_trains_the_same_from_a_store_elsewhere_and_keeps_two_windows_here(
    latents, tmp_path, monkeypatch
):
    split_moments(latents, 8)
    local = weights(latents.make("diffusion.shuffle_shards=1", "diffusion.batch_size=8"))

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    elsewhere = latents.elsewhere()
    task = elsewhere.task("diffusion.shuffle_shards=1", "diffusion.batch_size=8")
    task.out.fs.rm(task.out.path(""), recursive=True)
    elsewhere.make("diffusion.shuffle_shards=1", "diffusion.batch_size=8")
    assert same(load_file(task.out.local_file("model.safetensors")), local)
    assert len([*cache.folder().glob("*/*.arrow")]) <= 2

    assert not same(weights(latents.make("diffusion.batch_size=8")), local)  # another order


def test_moments_too_large_for_the_node_are_told_in_one_line_with_what_to_set(latents, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    elsewhere = latents.elsewhere()
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: cache.shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(StageError, match=r"1 files.*0\.0 GB free.*TMPDIR.*diffusion.shuffle_shards") as error:
        Denoiser.make(elsewhere.task())
    assert "\n" not in str(error.value)


def split_moments(latents, rows):
    """Publishes the same moments in shards of so many rows."""
    moments = latents.store.artifact("moments", "made-by-hand")
    reader = MomentsReader(moments)
    reader.hold([0])
    ids, values = read_moment_ids(moments).to_pylist(), reader.rows(np.arange(ROWS))
    shards = []
    for start in range(0, ROWS, rows):
        part = slice(start, start + rows)

        def write(path, part=part):
            write_moments(path, ids[part], values[part])

        shards.append(moments.publish_shard(f"part-{start}", ".arrow", rows, write))
    moments.publish({"shape": [1, 2, 4, 4], "shards": shards})


def test_gradient_checkpointing_changes_no_bit_and_accumulation_only_the_last_ones(latents):
    expected = weights(latents.make())
    for override, tolerance in (
        ("compute.gradient_checkpointing=true", 0.0),
        ("compute.gradient_accumulation=2", 1e-4),
    ):
        task = latents.task(override)
        task.out.fs.rm(task.out.path(""), recursive=True)
        for key, value in weights(latents.make(override)).items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=tolerance)


def test_compile_compiles_the_networks_blocks_in_place(latents, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    latents.make("compute.compile=true")
    assert compiled == ["Block"] * 3


def test_a_model_is_put_in_shards_only_where_workers_are_several(monkeypatch):
    from dpt_ray.cluster.training import _distributed
    from dpt_ray.training.workload import Worker

    model, sharded = torch.nn.Linear(1, 1), []
    monkeypatch.setattr("dpt_ray.training.sharding.shard", lambda *given: sharded.append(given))
    assert _distributed(model, [model], Worker(0, 1, "cpu"), fsdp=True) is model and not sharded
    assert _distributed(model, [model], Worker(0, 2, "cpu"), fsdp=True) is model
    assert sharded == [(model, [model], "cpu")]


def test_two_workers_that_share_one_model_go_on_from_a_checkpoint_of_one_that_had_it_all(latents, cluster):
    settings = (
        *("diffusion.steps=12", "diffusion.precision=bfloat16", "diffusion.alignment=0.5"),
        *("diffusion.preview_every=6", "diffusion.frechet_every=12"),
    )
    whole = latents.make(*settings)
    expected, log = weights(whole), read_log(whole.out)
    whole.out.fs.rm(whole.out.path(""), recursive=True)
    latents.make(*settings, "diffusion.steps=6")
    task = latents.make(*settings, "compute.train_workers=2", "compute.fsdp=true")
    assert task.out.manifest["continued_at_step"] == 6
    assert [r["loss"] for r in read_log(task.out)] == pytest.approx([r["loss"] for r in log], rel=1e-3)
    for key, value in weights(task).items():
        torch.testing.assert_close(value, expected.pop(key), rtol=0, atol=1e-3)
    assert not expected and task.out.exists("previews/000000012.png")
    assert read_log(task.out)[-1]["frechet"] == pytest.approx(log[-1]["frechet"], rel=0.05)


def test_previews_show_the_classes_and_leave_the_training_as_it_is(latents):
    from PIL import Image

    expected = weights(latents.make())
    task = latents.task()
    task.out.fs.rm(task.out.path(""), recursive=True)
    task = latents.make("diffusion.preview_every=5", "generate.guidance=1.4")
    assert same(weights(task), expected)
    folder = Path(task.out.path("previews"))
    assert sorted(path.name for path in folder.iterdir()) == ["000000005.png", "000000010.png"]
    # 4 rows of 8 images of 4 x 4 pixels, magnified to 64, with gutters of 2.
    images = [Image.open(path) for path in sorted(folder.iterdir())]
    assert {image.size for image in images} == {(8 * 66 + 2, 4 * 66 + 2)}
    assert images[0].tobytes() != images[1].tobytes()
