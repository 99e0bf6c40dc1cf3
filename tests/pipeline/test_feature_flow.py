"""What generating features adds to a run and leaves out of it, what it costs, and what is refused."""

import pytest

from dpt_ray.config import ConfigError, load_config
from dpt_ray.config.study import load_study
from dpt_ray.pipeline.cost import costs
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.network_cost import Cost
from tests.helpers.identities import changed
from tests.helpers.paths import CONFIGS, DIGITS

IMAGES = {"train": 997, "validation": 200, "test": 600}
PILOT = {
    "feature_denoiser": "index features pseudo_labels",
    "feature_samples": "feature_denoiser",
    "generated_features": "index features labels feature_samples",
    "pilot": "index features probe classifier generated_features",
}
OF_IMAGES = {
    *("autoencoder", "moments", "denoiser", "samples", "sample_features", "retrained"),
    *("referee", "referee_features", "referee_sample_features"),
}


def nodes(*overrides):
    return flow(load_config(DIGITS, overrides))


def inputs(node):
    return {source.name for source in node.hashed_inputs.values()}


def test_both_adds_the_pilot_and_changes_what_is_measured_alone():
    before, after = nodes(), nodes("generate_in=both")
    assert after.keys() - before.keys() == PILOT.keys() and before.keys() <= after.keys()
    for name, sources in PILOT.items():
        assert inputs(after[name]) == set(sources.split()), name
    other = {name for name in before if before[name].reference != after[name].reference}
    assert other == {"evaluation", "report"}


def test_features_come_before_images():
    order = list(nodes("generate_in=both"))
    assert order.index("pilot") < order.index("denoiser")


def test_features_alone_leave_stage_2_on_images_out_and_keep_the_controls():
    both, alone = nodes("generate_in=both"), nodes("generate_in=features")
    assert both.keys() - alone.keys() == OF_IMAGES and alone.keys() <= both.keys()
    same = {name for name in alone if alone[name].reference == both[name].reference}
    assert same == alone.keys() - {"sweep", "evaluation", "report"}
    assert inputs(alone["sweep"]) == {
        *("index", "features", "labels", "augmented_features", "pseudo_labels"),
    }
    assert "sweep" not in nodes("generate_in=features", "evaluate.controls=false")


def test_features_alone_do_not_look_at_what_images_need():
    found = nodes(
        "generate_in=features",
        "data.mode=RGB",
        "autoencoder={kind: kl, weights: absent.pth}",
        "evaluate.inception=absent.pth",
    )
    assert not any(node.missing for node in found.values())


@pytest.mark.parametrize("rung", ["propagation", "best"])
def test_the_feature_denoiser_has_the_labels_of_the_rung_that_is_named(rung):
    found = nodes("generate_in=both", "ladder={}", f"labels_from={rung}")
    assert found["feature_denoiser"].inputs["pseudo_labels"] is found[rung]
    assert {"balanced_self_training", "generated_features"} <= inputs(found["pilot"])
    assert "generated_features" not in inputs(found["ladder"])


def test_settings_change_what_they_are_about():
    base = ("generate_in=both",)
    sampled = {"feature_samples", "generated_features", "pilot", "evaluation", "report"}
    assert changed("feature_diffusion.guidance=2", base=base) == sampled
    assert changed("feature_diffusion.nfe=9", base=base) == sampled
    assert changed("feature_diffusion.steps=9", base=base) == {"feature_denoiser", *sampled}
    # More features are another extent of the same artifact.
    assert changed("feature_diffusion.images_per_class=9", base=base) == sampled
    digests = [
        nodes(*base, *more)["feature_samples"].digest
        for more in ((), ("feature_diffusion.images_per_class=9",))
    ]
    assert digests[0] == digests[1]
    assert changed("feature_diffusion.checkpoint_every=9", base=base) == set()
    assert changed("feature_diffusion.steps=9") == set()  # nothing uses it where images are generated


def test_as_many_features_as_images_of_each_class_unless_told():
    assert load_config(DIGITS).features_per_class == 128
    assert load_config(DIGITS, ["feature_diffusion.images_per_class=1000"]).features_per_class == 1000


def test_the_draws_of_a_study_have_feature_denoisers_of_their_own():
    _, configs = load_study(CONFIGS / "digits_study.yaml", ["generate_in=features", "study.references=[]"])
    seeds = {config.feature_diffusion.seed for config in configs.values()}
    assert len(seeds) == len({config.diffusion.seed for config in configs.values()}) > 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("generate_in=pixels", "generate_in.*'images', 'features' or 'both'"),
        ("feature_diffusion={width: 7}", "feature_diffusion.width"),
        ("feature_diffusion={depth: 0}", "feature_diffusion.depth"),
        ("feature_diffusion={layers: 2}", "feature_diffusion.layers"),
        ("feature_diffusion.batch_size=24", r"feature_diffusion.batch_size 24 must be a multiple of 8 x"),
    ],
)
def test_what_does_not_fit_is_one_line(settings, said):
    with pytest.raises(ConfigError, match=said) as error:
        load_config(DIGITS, ["generate_in=both", "compute.train_workers=2", settings])
    assert "\n" not in str(error.value)


def test_the_costs_of_features_are_those_of_their_layers():
    overrides = ["feature_diffusion={width: 32, depth: 2, steps: 10, batch_size: 16, nfe: 5}"]
    found = costs(load_config(DIGITS, [*overrides, "generate_in=both"]), IMAGES, 10)
    # Features of length 64. Each block has two layers and a modulation of three, the network two layers for
    # time, a modulation of two, and both ends.
    layers = 2 * (2 + 3) * 32**2 + (2 + 2) * 32**2 + 2 * 32 * 64
    assert found["feature_denoiser"].transformer == 3 * 2 * layers * 10 * 16
    assert found["feature_samples"] == Cost(1280, 1280 * 4 * 64, transformer=5 * 2 * layers * 1280)
    guided = costs(
        load_config(DIGITS, [*overrides, "generate_in=both", "feature_diffusion.guidance=2"]), IMAGES, 10
    )
    assert guided["feature_samples"].transformer == 2 * 5 * 2 * layers * 1280
    assert found["generated_features"].rows == 1280


def test_features_alone_cost_nothing_of_images():
    found = costs(load_config(DIGITS, ["generate_in=features"]), IMAGES, 10)
    assert not OF_IMAGES & found.keys() and {"feature_denoiser", "sweep", "augmented"} <= found.keys()
    assert costs(load_config(DIGITS, ["generate_in=features"]), None, None)["feature_samples"] == Cost()
