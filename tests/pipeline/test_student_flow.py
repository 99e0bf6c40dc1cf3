"""What a student adds to a run: its teacher, its nodes, and what is refused."""

import pytest

from dpt_ray.config import ConfigError, load_config
from dpt_ray.pipeline.flow import flow
from tests.helpers.identities import changed
from tests.helpers.paths import DIGITS

STUDENT = "student={width: 8, dim: 16, steps: 10, batch_size: 32, learning_rate: 1e-3}"
LEARNER = (
    "classifier.learner=freematch",
    "semi_supervised={steps: 5, batch_size: 16, learning_rate: 1e-3}",
)
ADDED = {"student", "student_features", "student_classifier"}


def test_a_student_adds_its_nodes_and_changes_what_is_measured_alone():
    before, after = flow(load_config(DIGITS)), flow(load_config(DIGITS, [STUDENT]))
    assert after.keys() - before.keys() == ADDED
    assert {name for name in before if before[name].reference != after[name].reference} == {
        "evaluation",
        "report",
    }


@pytest.mark.parametrize(
    ("settings", "classifier", "features"),
    [
        ((), "retrained", "features"),
        (("student.teacher=probe",), "classifier", "features"),
        (("ladder={}", "student.teacher=propagation"), "propagation", "features"),
        (("ladder={}", "student.teacher=best"), "best", "features"),
        (("ladder={}", "labels_from=best", "generate_in=features"), "best", "features"),
        (("generate_in=features",), "classifier", "features"),
        (("generate_in=features", "student.teacher=generated_features"), "generated_features", "features"),
        (("diffusion.condition=none",), "classifier", "features"),
        (LEARNER, "retrained_learner_classifier", "retrained_learner_features"),
        ((*LEARNER, "student.teacher=learner"), "learner_classifier", "learner_features"),
        ((*LEARNER, "generate_in=features"), "learner_classifier", "learner_features"),
        ((*LEARNER, "student.teacher=retrained"), "retrained", "features"),
    ],
)
def test_the_teacher_is_the_last_classifier_or_the_one_that_is_named(settings, classifier, features):
    nodes = flow(load_config(DIGITS, [STUDENT, *settings]))
    inputs = nodes["student"].inputs
    assert (inputs["teacher"].name, inputs["features"].name) == (classifier, features)
    assert nodes["student_features"].inputs["encoder"] is nodes["student"]


def test_the_teachers_name_is_not_hashed_and_the_temperature_is():
    assert changed("student.teacher=retrained", base=(STUDENT,)) == set()
    everything = ADDED | {"evaluation", "report"}
    for change in ("student.temperature=0.5", "student.teacher=probe", "student.width=16"):
        assert changed(change, base=(STUDENT,)) == everything
    assert changed("student.log_every=3", base=(STUDENT,)) == set()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            ["student.teacher=learner"],
            "this run makes no such classifier: name one of probe, retrained, or configure what makes it",
        ),
        (["student.teacher=best"], "student.teacher best: this run makes no such classifier"),
        (["student.teacher=retrained", "generate_in=features"], "name one of probe, generated_features, or"),
        (["student.teacher=balanced_rounds", "ladder={rungs: [tuned_probe]}"], "probe, tuned_probe, best"),
        (
            ["labels_from=file", "pseudo_labels_file=x.csv", "diffusion.condition=none"],
            "student.teacher file",
        ),
        (["student.teacher=someone"], "student.teacher: 'someone': input should be 'probe'"),
        (["student.temperature=0"], "student.temperature: 0: input should be greater than 0"),
        (["student.views=all"], "student.views: 'all': input should be 'digits', 'small_images' or"),
        (["student.network=vit_tiny_patch16_224"], "student: network vit_tiny_patch16_224 with"),
        (["student.network=test_vit", "student.patch_size=3"], "student.patch_size 3 must divide data.image"),
        (
            ["compute.train_workers=8", "pretrain.batch_size=512", "diffusion.batch_size=512"],
            "student.batch_size 32 must be a multiple of 8 x compute.train_workers (8)",
        ),
    ],
)
def test_settings_that_do_not_fit_are_one_line(settings, said):
    with pytest.raises(ConfigError) as refused:
        load_config(DIGITS, [STUDENT, *settings])
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_network_that_timm_does_not_have_is_named_before_anything_is_made():
    changes = [STUDENT, "student.network=no_such_vit", "student.patch_size=4"]
    with pytest.raises(
        ConfigError, match=r"student\.network: network 'no_such_vit' is neither small_conv nor"
    ):
        flow(load_config(DIGITS, changes))
