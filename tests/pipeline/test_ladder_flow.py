"""What the ladder of stage 1 adds to a run, and which settings decide it."""

import pytest

from dpt_ray.config import ConfigError, load_config
from dpt_ray.pipeline.flow import flow
from tests.helpers.identities import changed
from tests.helpers.paths import DIGITS

RUNG = "index features labels"
LADDER = {
    "graph": "index features",
    **dict.fromkeys(("tuned_probe", "self_training", "balanced_self_training", "balanced_rounds"), RUNG),
    "propagation": f"{RUNG} graph",
    "ladder": "index features probe classifier tuned_probe self_training balanced_self_training "
    "balanced_rounds propagation",
}


def test_a_ladder_adds_its_nodes_and_changes_what_is_measured_alone():
    before, after = flow(load_config(DIGITS)), flow(load_config(DIGITS, ["ladder={}"]))
    assert after.keys() - before.keys() == LADDER.keys()
    for name, inputs in LADDER.items():
        assert {source.name for source in after[name].hashed_inputs.values()} == set(inputs.split()), name
    other = {name for name in before if before[name].reference != after[name].reference}
    assert other == {"evaluation", "report"}


@pytest.mark.parametrize("rung", ["propagation", "best"])
def test_the_denoiser_and_the_control_have_the_labels_of_the_rung_that_is_named(rung):
    nodes = flow(load_config(DIGITS, ["ladder={}", f"labels_from={rung}"]))
    assert nodes["denoiser"].inputs["pseudo_labels"] is nodes[rung]
    assert nodes["sweep"].inputs["pseudo_labels"] is nodes[rung]
    same = flow(load_config(DIGITS, ["ladder={}"]))["denoiser"].reference
    assert same == flow(load_config(DIGITS))["denoiser"].reference != nodes["denoiser"].reference


def test_the_prior_changes_the_balanced_rungs_alone_and_the_neighbours_the_propagation():
    assert changed("ladder.prior=none", base=("ladder={}",)) == {
        *("balanced_self_training", "balanced_rounds", "propagation", "ladder", "evaluation", "report"),
    }
    assert changed("ladder.neighbours=5", base=("ladder={}",)) == {
        *("graph", "propagation", "ladder", "evaluation", "report"),
    }


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["labels_from=best"], "labels_from best needs a ladder section"),
        (
            ["ladder={rungs: [tuned_probe]}", "labels_from=propagation"],
            r"labels_from propagation is not among ladder.rungs \(tuned_probe\)",
        ),
        (["ladder={prior: [1]}"], "ladder.prior"),
        (["ladder={neighbours: 0}"], "ladder.neighbours"),
    ],
)
def test_a_ladder_that_does_not_fit_is_one_line(settings, said):
    with pytest.raises(ConfigError, match=said):
        load_config(DIGITS, settings)
