"""Which settings decide which artifacts, and in which order they are made."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dpt_ray.config import ConfigError, load_config
from dpt_ray.engine.execute import steps
from dpt_ray.pipeline.flow import flow
from tests.helpers.identities import changed, digests
from tests.helpers.paths import DIGITS

RGB = "data.mode=RGB"  # what published networks take

# What each node is made from (ARCHITECTURE.md, "The flow"), written out by hand.
INPUTS = {
    "index": "",
    "labels": "index",
    "encoder": "index",
    "autoencoder": "",
    "features": "index encoder",
    "moments": "index autoencoder",
    "classifier": "index features labels",
    "pseudo_labels": "index features classifier",
    "probe": "index features classifier pseudo_labels",
    "denoiser": "index moments autoencoder pseudo_labels",
    "samples": "denoiser autoencoder",
    "sample_features": "samples encoder",
    "retrained": "index features labels sample_features",
    "augmented": "index labels",
    "augmented_features": "augmented encoder",
    "sweep": "index features labels sample_features augmented_features pseudo_labels",
    "referee": "index",
    "referee_features": "index referee",
    "referee_sample_features": "samples referee",
    "evaluation": "index features classifier probe retrained sweep sample_features referee_features "
    "referee_sample_features",
    "report": "index labels encoder autoencoder features moments classifier pseudo_labels probe denoiser "
    "samples sample_features retrained augmented augmented_features sweep referee referee_features "
    "referee_sample_features evaluation",
}


def below(*names):
    """The nodes, and all that is made from them by the table above."""
    found = set(names)
    for name, inputs in INPUTS.items():
        if found & set(inputs.split()):
            found.add(name)
    return found


def test_the_flow_is_the_designed_one():
    nodes = flow(load_config(DIGITS))
    assert nodes.keys() == INPUTS.keys()
    for name, node in nodes.items():
        assert {source.name for source in node.hashed_inputs.values()} == set(INPUTS[name].split()), name


def unhashed(node):
    """The names of the inputs that do not decide a node's result."""
    decide = {source.name for source in node.hashed_inputs.values()}
    return {source.name for source in node.inputs.values()} - decide


@pytest.mark.parametrize(
    "override",
    [
        "output=/elsewhere",
        "compute.actors=1",
        "compute.threads=2",
        "compute.train_workers=2",
        "compute.batch_size=8",
        "compute.cpus=1",
        "compute.max_failures=0",
        "compute.gradient_accumulation=2",
        "compute.gradient_checkpointing=true",
        "compute.compile=true",
        "compute.fsdp=true",
        "diffusion.preview_every=100",
        "diffusion.frechet_every=100",
        "pretrain.log_every=3",
        "pretrain.checkpoint_every=7",
        "diffusion.log_every=3",
        "diffusion.checkpoint_every=7",
        "evaluate.referee.log_every=3",
        "data.max_bad_fraction=0.5",
    ],
)
def test_how_a_run_is_carried_out_decides_no_identity(override):
    two = "pretrain.contrast_group=32"  # half a batch: two workers can share it
    assert changed(override, base=[two]) == set()


def test_the_name_is_on_the_page_and_nowhere_else():
    assert changed("name=other") == {"report"}


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("data.image_size=16", below("index", "autoencoder")),
        ("labels.seed=1", below("labels")),
        ("labels.per_class=2", below("labels")),
        ("pretrain.seed=1", below("encoder")),
        ("pretrain.steps=601", below("encoder")),
        ("pretrain.batch_size=128", below("encoder")),
        ("pretrain.precision=bfloat16", below("encoder")),
        ("encoder.precision=bfloat16", below("features", "sample_features", "augmented_features",
                                             "referee_features", "referee_sample_features")),
        ("autoencoder.flips=true", below("moments")),
        ("autoencoder.precision=bfloat16", below("moments", "samples")),
        ("classifier.l2=0.01", below("classifier")),
        ("diffusion.seed=1", below("denoiser")),
        ("diffusion.ema_decay=0.9", below("denoiser")),
        ("diffusion.model.depth=6", below("denoiser")),
        ("diffusion.label_dropout=0.2", below("denoiser")),
        ("diffusion.min_snr_gamma=5", below("denoiser")),
        ("diffusion.min_confidence=0.5", below("denoiser")),
        ("diffusion.shuffle_shards=64", below("denoiser")),
        ("diffusion.shuffle_shards=null", set()),
        ("diffusion.alignment=0.5", below("denoiser")),
        ("generate.guidance=1.4", below("samples")),
        ("generate.guidance_interval=[0.1, 0.9]", below("samples")),
        ("generate.nfe=20", below("samples")),
        ("generate.solver=dpm_solver_fast", below("samples")),
        ("generate.seed=1", below("samples", "augmented")),
        ("generate.indices_per_shard=32", below("samples", "augmented")),
        ("generate.images_per_class=256", below("samples", "augmented")),
        ("retrain.real_weight=2", below("retrained")),
        ("retrain.l2=0.1", below("retrained")),
        ("retrain.images_per_class=64", below("retrained")),
        ("sweep.l2=[0.1]", below("sweep")),
        ("sweep.images_per_class=[16]", below("sweep")),
        ("evaluate.augment_strength=0.5", below("augmented")),
        ("evaluate.referee.seed=1", below("referee")),
    ],
)  # fmt: skip
def test_a_setting_changes_what_depends_on_it_and_nothing_else(override, where):
    assert changed(override) == where


def test_a_denoiser_of_true_labels_does_not_depend_on_the_few():
    base = ["diffusion.condition=true_labels"]
    assert not {"denoiser", "samples", "sample_features"} & changed("labels.seed=1", base=base)
    assert "denoiser" in changed(*base)


def test_what_a_training_is_watched_by_is_there_before_it():
    nodes = flow(load_config(DIGITS, ["diffusion.frechet_every=100", "diffusion.condition=true_labels"]))
    assert unhashed(nodes["denoiser"]) == {"features", "encoder"}
    order = [node.name for step in steps([nodes["denoiser"]]) for node in step.nodes]
    assert order.index("features") < order.index("denoiser")
    assert unhashed(flow(load_config(DIGITS))["denoiser"]) == set()


def test_the_encoders_that_measure_are_handed_to_the_evaluation():
    evaluation = flow(load_config(DIGITS))["evaluation"]
    assert unhashed(evaluation) == {"labels", "encoder", "referee", "samples", "moments", "denoiser"}


def test_a_run_without_conditions_ends_with_its_images():
    names = flow(load_config(DIGITS, ["diffusion.condition=none"])).keys()
    assert {"samples", "evaluation", "report"} <= names
    assert not {"retrained", "sweep", "sample_features"} & names


def test_only_samples_at_bfloat16_are_made_again_since_the_denoiser_samples_at_it_too():
    versions = [
        flow(load_config(DIGITS, [f"autoencoder.precision={precision}"]))["samples"].version
        for precision in ("float32", "bfloat16")
    ]
    assert versions == [1, 2]


def test_more_images_extend_the_same_artifact():
    few, many = (flow(load_config(DIGITS, [f"generate.images_per_class={count}"])) for count in (128, 256))
    for name in ("samples", "sample_features", "augmented", "augmented_features", "referee_sample_features"):
        assert few[name].digest == many[name].digest
        assert (str(few[name].extent), str(many[name].extent)) == ("k128", "k256")
    for name in ("retrained", "sweep", "evaluation"):  # these are made from all of them
        assert few[name].digest != many[name].digest


def test_equal_values_in_another_notation_are_the_same_run():
    assert changed("retrain.real_weight=1", "diffusion.learning_rate=0.004", "generate.guidance=1") == set()


def test_runs_share_what_they_have_in_common(tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(f"base: {DIGITS}\nname: other\ngenerate: {{guidance: 2.0}}\ncompute: {{actors: 1}}\n")
    mine, theirs = digests(), digests(path=other)
    assert {name for name in mine if mine[name] != theirs[name]} == below("samples")


def test_a_label_list_counts_by_its_content(tmp_path):
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    one.write_text("id,label\ndigit-0000,0\n")
    two.write_text(one.read_text())
    base = ["labels.per_class=null", f"labels.file={one}"]
    assert changed(f"labels.file={two}", base=base) == set()
    before = digests(*base)
    one.write_text("id,label\ndigit-0000,1\n")
    after = digests(*base)
    assert {name for name in before if before[name] != after[name]} == below("labels")


@pytest.mark.parametrize(
    ("section", "kind", "node"), [("encoder", "msn", "encoder"), ("autoencoder", "kl", "autoencoder")]
)
def test_a_weight_file_counts_by_its_content(tmp_path, section, kind, node):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    for path, value in ((one, 1.0), (two, 1.0)):
        save_file({"w": torch.full((2,), value)}, path)
    base = [RGB, f"{section}.kind={kind}", f"{section}.weights={one}"]
    assert changed(f"{section}.weights={two}", base=base) == set()
    before = digests(*base)
    save_file({"w": torch.full((2,), 2.0)}, one)
    after = digests(*base)
    assert {name for name in before if before[name] != after[name]} == below(node)


def test_images_count_by_their_names_and_sizes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"123")
    base = ["data.source=folder", f"data.uri={tmp_path}"]
    before = digests(*base)
    (tmp_path / "a" / "1.png").touch()  # another time only
    (tmp_path / "labels.csv").write_text("no image")
    assert digests(*base) == before
    (tmp_path / "a" / "2.png").write_bytes(b"1")
    after = digests(*base)
    assert {name for name in before if before[name] != after[name]} == below("index")
    (tmp_path / "b").mkdir()  # a class without an image
    named = digests(*base)
    assert {name for name in before if after[name] != named[name]} == below("index")
    (tmp_path / "b").rmdir()
    assert digests(*base) == after


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["labels.per_class=", "labels.file=/none/few.csv"], ["labels.file: /none/few.csv", "no such file"]),
        (
            [RGB, "encoder.kind=msn", "encoder.weights=/none.pth"],
            ["encoder.weights: /none.pth", "no such file"],
        ),
        ([RGB, "autoencoder.kind=kl", "autoencoder.weights=no://x"], ["autoencoder.weights: ", "not known"]),
        (
            ["evaluate.inception=/none.pth"],
            ["evaluate.inception: /none.pth", "pt_inception-2015-12-05-6726825d.pth", "mseitzer/pytorch-fid"],
        ),
        (
            ["evaluate.inception=README.md", "evaluate.reference=/none.npz"],
            ["evaluate.reference: /none.npz", "no such file"],
        ),
        (["data.source=tar", "data.uri=/none"], ["data.uri: '/none'", "check the path"]),
        (["data.source=tar", "data.uri=no://x"], ["data.uri: 'no://x'", "not known"]),
    ],
)
def test_a_file_that_is_not_there_is_told_by_its_key(overrides, parts):
    with pytest.raises(ConfigError) as caught:
        assert flow(load_config(DIGITS, overrides))["report"].digest
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_stops_only_what_is_made_from_it():
    nodes = flow(load_config(DIGITS, [RGB, "encoder.kind=msn", "encoder.weights=/none.pth"]))
    without = {name for name, node in nodes.items() if node.missing}
    assert without == below("encoder")
    assert {nodes[name].missing for name in without} == {nodes["encoder"].unreadable}
    assert all(len(node.digest) == 16 for name, node in nodes.items() if name not in without)


@pytest.fixture
def inception_files(tmp_path):
    """Overrides that name a weight file (never opened here) and a reference; and where these lie."""
    weights, reference = tmp_path / "inception.pth", tmp_path / "reference.npz"
    weights.write_bytes(b"weights")
    np.savez(reference, mu=np.zeros(2048), sigma=np.zeros((1, 1)))
    return [f"evaluate.inception={weights}", f"evaluate.reference={reference}"], weights, reference


def test_inception_adds_its_nodes_and_changes_no_other_but_what_shows_them(inception_files):
    base, _, _ = inception_files
    before, after = digests(), digests(*base)
    added = {"inception", "inception_samples", "inception_reference", "image_metrics"}
    assert after.keys() - before.keys() == added
    assert {name for name in before if before[name] != after[name]} == {"evaluation", "report"}
    nodes = flow(load_config(DIGITS, base))
    inputs = {name: {source.name for source in nodes[name].hashed_inputs.values()} for name in added}
    assert inputs == {
        "inception": set(),
        "inception_samples": {"samples", "inception"},
        "inception_reference": {"index", "inception"},
        "image_metrics": {"inception_samples", "inception_reference", "inception"},
    }
    order = [step.name for step in steps([nodes["labels"], nodes["report"]])]
    assert order.index("measure images") == order.index("image_metrics") - 1  # both sets in one step
    for target in ("report", "image_metrics"):  # a file that cannot serve is told early
        order = [step.name for step in steps([nodes["labels"], nodes[target]])]
        assert order.index("inception") < order.index("denoiser")


def test_inception_files_count_by_their_content(inception_files, tmp_path):
    base, weights, _ = inception_files
    measured = {"inception_samples", "inception_reference"}
    shown = {"image_metrics", "evaluation", "report"}
    copy = tmp_path / "copy.pth"
    copy.write_bytes(weights.read_bytes())
    assert changed(f"evaluate.inception={copy}", base=base) == set()
    copy.write_bytes(b"others")
    assert changed(f"evaluate.inception={copy}", base=base) == {"inception"} | measured | shown
    other = tmp_path / "other.npz"
    np.savez(other, mu=np.ones(2048), sigma=np.zeros((1, 1)))
    assert changed(f"evaluate.reference={other}", base=base) == shown
    assert changed("evaluate.resize=clean", base=base) == measured | shown
    assert changed("evaluate.images=100", base=base) == {"inception_samples"} | shown


def test_other_numbers_of_measured_images_are_extents_of_one_artifact(inception_files):
    base, _, _ = inception_files
    asked = ([], ["evaluate.images=100"], ["generate.images_per_class=256"])
    nodes = [flow(load_config(DIGITS, [*base, *more]))["inception_samples"] for more in asked]
    assert len({node.digest for node in nodes}) == 1
    assert [str(node.extent) for node in nodes] == ["k128", "k128-n100", "k256"]


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"mu": np.zeros(2048)}, r"lacks \['sigma'\], it has \['mu'\]"),
        ({"arr_0": np.zeros(3)}, r"lacks \['mu', 'sigma'\]"),
        ({"mu": np.zeros(192), "sigma": np.zeros((192, 192))}, r"mu has shape \(192,\)"),
        ({"mu": np.full(2048, np.nan), "sigma": np.zeros((1, 1))}, "mu has values that are not finite"),
    ],
)
def test_a_reference_that_cannot_serve_is_told_before_any_work(inception_files, arrays, problem):
    base, _, reference = inception_files
    np.savez(reference, **arrays)
    with pytest.raises(ConfigError, match=rf"evaluate\.reference: .*reference\.npz.*{problem}"):
        assert flow(load_config(DIGITS, base))["image_metrics"].digest


# Order ---------------------------------------------------------------------------------------------


def test_inputs_come_before_what_is_made_from_them_and_only_what_is_needed():
    nodes = flow(load_config(DIGITS))
    order = [step.nodes for step in steps([nodes["report"]])]
    place = {node.name: number for number, group in enumerate(order) for node in group}
    assert place.keys() == nodes.keys()
    for name, inputs in INPUTS.items():
        assert all(place[source] < place[name] for source in inputs.split())
    needed = {node.name for step in steps([nodes["pseudo_labels"]]) for node in step.nodes}
    assert needed == {"index", "labels", "encoder", "features", "classifier", "pseudo_labels"}


def test_the_labels_are_checked_before_anything_is_trained():
    nodes = flow(load_config(DIGITS))
    names = [step.name for step in steps([nodes["labels"], nodes["report"]])]
    assert names[:2] == ["index", "labels"]


def test_what_one_pass_makes_is_one_step():
    nodes = flow(load_config(DIGITS))
    groups = [{node.name for node in step.nodes} for step in steps([nodes["report"]])]
    assert {"features", "moments", "referee_features"} in groups
    assert {"sample_features", "referee_sample_features"} in groups
    assert sum(len(group) for group in groups) == len(nodes)
