"""What a run costs, against formulas written out by hand."""

import pytest

from dpt_ray.config import load_config
from dpt_ray.data.class_ranges import class_ranges, items
from dpt_ray.pipeline.cost import FIT_PASSES, costs, fit_shape, total_seconds
from dpt_ray.pipeline.network_cost import Cost
from dpt_ray.pipeline.speed import FitShape, Rates
from tests.helpers.paths import DIGITS

IMAGES = {"train": 997, "validation": 200, "test": 600}


def conv(width_in, width, side, kernel=3):
    """The operations of a convolution on side x side places."""
    return 2 * kernel**2 * width_in * width * side**2


def residual(width_in, width, side):
    skip = conv(width_in, width, side, 1) if width != width_in else 0
    return conv(width_in, width, side) + conv(width, width, side) + skip


def small_network(width, dim):
    """One image of 8 x 8 grey pixels: three stages, the later two at half the side and twice the width."""
    stages = residual(width, width, 8) + residual(width, 2 * width, 4) + residual(2 * width, 4 * width, 2)
    return conv(1, width, 8) + stages + 2 * 4 * width * dim


def test_the_small_networks_cost_what_their_layers_do():
    found = costs(load_config(DIGITS), IMAGES, 10)
    forward = small_network(24, 64)
    assert found["encoder"].flops == 600 * 64 * 2 * 3 * forward  # two views, and the way back is two
    assert found["features"].flops == 1797 * forward
    assert found["sample_features"].flops == found["augmented_features"].flops == 1280 * forward
    assert found["referee"].flops == 300 * 128 * 3 * small_network(16, 64)
    assert found["referee_features"].rows == 1797
    assert found["augmented"].bytes == 1280 * 64


def test_whole_units_of_images_are_counted():
    few = ["generate.images_per_class=20", "retrain.images_per_class=20", "sweep.images_per_class=[20]"]
    found = costs(load_config(DIGITS, few), IMAGES, 10)
    units = class_ranges(20, load_config(DIGITS, few).generate.indices_per_shard, 10)
    made = sum(len(items(unit)) for unit in units)
    assert made == 320
    for name in ("samples", "sample_features", "augmented_features"):
        assert found[name].rows == made, name


def test_a_student_costs_three_passes_of_its_own_network():
    student = "student={width: 8, dim: 16, steps: 10, batch_size: 32, learning_rate: 1e-3}"
    found = costs(load_config(DIGITS, [student]), IMAGES, 10)
    assert found["student"].flops == 10 * 32 * 3 * small_network(8, 16)
    assert found["student_features"].flops == 1797 * small_network(8, 16)
    assert "student" not in costs(load_config(DIGITS), IMAGES, 10)


def test_what_a_run_does_not_do_costs_nothing():
    off = load_config(DIGITS, ["evaluate.controls=false", "evaluate.referee=null"])
    assert (
        not {"augmented", "augmented_features", "referee", "referee_features"} & costs(off, IMAGES, 10).keys()
    )


def test_the_sweep_costs_passes_over_the_rows_of_its_fits():
    config, pass_of_a_row = (
        load_config(DIGITS),
        2 * 2 * 64 * 10,
    )  # logits and gradient: 64 features, 10 classes
    sweep = costs(config, IMAGES, 10)["sweep"]
    # By hand: 4 penalties of the probe on 10 labels; 2 real weights x 2 penalties of self-training on all
    # training images, and of generated and of augmented images at 32, 64 and 128 per class.
    rows = 4 * 10 + 4 * (10 + 997) + 2 * 4 * (3 * 10 + 320 + 640 + 1280)
    assert sweep == Cost(32, 32 * 4 * 64 * 10, fit=FIT_PASSES * rows * pass_of_a_row)
    assert fit_shape(config, IMAGES, 10) == FitShape(1290, 64, 10)
    assert sweep.gpu_hours is None  # fits run on CPUs


def test_without_controls_and_validation_the_sweep_is_that_of_generated_images():
    one = ["evaluate.controls=false", "sweep={images_per_class: [128], real_weight: [1.0], l2: [0.0025]}"]
    sweep = costs(load_config(DIGITS, one), {"train": 997, "test": 600}, 10)["sweep"]
    assert (sweep.rows, sweep.fit) == (1, FIT_PASSES * 1290 * 4 * 64 * 10)
    none = load_config(DIGITS, ["evaluate.controls=false", "sweep=null"])
    assert "sweep" not in costs(none, IMAGES, 10)
    assert costs(load_config(DIGITS), None, None)["sweep"] == Cost()


def test_the_one_fit_of_stage_3_is_counted_where_it_is_the_only_one():
    alone = load_config(DIGITS, ["evaluate.controls=false", "sweep=null"])
    found = costs(alone, IMAGES, 10)["retrained"]
    assert (found.rows, found.fit) == (1290, FIT_PASSES * 1290 * 4 * 64 * 10)
    assert fit_shape(alone, IMAGES, 10) == FitShape(1290, 64, 10)
    nothing = load_config(DIGITS, ["evaluate.controls=false", "sweep=null", "diffusion.condition=none"])
    assert "retrained" not in costs(nothing, IMAGES, 10) and fit_shape(nothing, IMAGES, 10) is None


def test_the_ladder_costs_what_its_folds_do_whatever_keeps_it_from_validation_images():
    ladder = "ladder={rungs: [balanced_self_training]}"

    def fit(images, *overrides):
        config = load_config(DIGITS, [ladder, "labels.per_class=5", *overrides])
        return costs(config, images, 10)["balanced_self_training"].fit

    by_folds = fit({"train": 997, "test": 600})
    assert fit(IMAGES, "ladder.choose_on=labels") == by_folds == pytest.approx(5.25 * fit(IMAGES))
    one = ("ladder.choose_on=labels", "labels.per_class=1")
    assert fit(IMAGES, *one) == pytest.approx(fit(IMAGES) / 4)  # one fit and nothing to choose among


def test_a_published_timm_model_costs_what_its_paper_says():
    """ViT-B/16 at 224 pixels: 17.6 GFLOPs of multiply-adds (arXiv 2010.11929's successors, DeiT Table 5)."""
    published = load_config(
        DIGITS, ["data.mode=RGB", "encoder.kind=timm", "encoder.name=vit_base_patch16_224.mae"]
    )
    found = costs(published, IMAGES, 10)
    assert "encoder" not in found
    assert found["features"].flops / 1797 == pytest.approx(2 * 17.58e9, rel=0.02)
    assert found["features"].bytes == 1797 * 768 * 4


def test_time_here_is_by_the_rate_of_each_kind_of_network():
    rates = Rates(conv=2e9, transformer=5e9, device="cpu")
    samples = Cost(10, conv=4e9, transformer=10e9)
    assert samples.seconds(rates) == 4.0
    assert Cost(10).seconds(rates) is None
    fits = Cost(10, fit=6e9)
    assert fits.seconds(rates) is None  # a rate that was not measured
    assert fits.seconds(Rates(conv=2e9, transformer=5e9, device="cpu", fit=3e9)) == 2.0
    assert total_seconds({"a": samples, "b": Cost(10), "c": Cost(conv=2e9)}, rates) == 5.0


def test_the_ladder_costs_its_products_of_matrices():
    found = costs(load_config(DIGITS, ["ladder={}"]), IMAGES, 10)
    assert found["graph"].flops == 2 * 997**2 * 64
    assert found["graph"].bytes == 997 * 20 * (4 + 4)
    # 140 passes with logits and gradient, each 2 operations an entry.
    fit = 140 * 4 * 997 * 64 * 10
    assert found["self_training"].flops == found["balanced_self_training"].flops == fit
    assert found["balanced_rounds"].flops == 4 * fit
    # 60 products with at most 2 x 20 entries a row, each counted as 4.
    assert found["propagation"].flops == fit + 4 * 60 * 2 * 40 * 997 * 10
    few = costs(load_config(DIGITS, ["ladder={rungs: [self_training]}"]), IMAGES, 10)
    assert "self_training" in few and not {"graph", "propagation", "tuned_probe"} & few.keys()


def test_a_choice_by_cross_validation_costs_a_fit_for_each_fold():
    """Three labels a class are three folds with all four settings, and the best once more."""
    few = {"train": 997}
    found = costs(load_config(DIGITS, ["ladder={}", "labels.per_class=3"]), few, 10)
    once = costs(load_config(DIGITS, ["ladder={}", "labels.per_class=3"]), IMAGES, 10)
    assert found["self_training"].flops == 3.25 * once["self_training"].flops
