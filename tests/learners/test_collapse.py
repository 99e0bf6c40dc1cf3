from dpt_ray.learners.collapse import collapse


def record(entropy, above=0.9):
    return {"step": 1, "loss": 1.0, "class_entropy": entropy, "above_threshold": above}


def test_balanced_predictions_say_nothing():
    assert collapse([]) == ""
    assert collapse([{"step": 1, "loss": 1.0}]) == ""  # supervised: there are no others
    assert collapse([record(0.3)] * 20 + [record(0.95)] * 5) == ""  # what it was before


def test_predictions_of_few_classes_are_told_with_their_numbers():
    said = collapse([record(1.0)] * 20 + [record(0.5), record(0.7)] * 2 + [record(0.6, above=0.4)])
    assert "entropy 0.60 of log C" in said and "80% of the images above" in said
