"""sweep: the best setting of each method, and how many others are as good within the error."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from rich.table import Table

from dpt_ray.evaluation.methods import METHODS
from dpt_ray.learners.agreement import images_of_trial
from dpt_ray.stages.evaluation import CHOSEN, swept_methods
from dpt_ray.store.records import Manifest, TrialShard


def sweep_table(sweep: Manifest, evaluated: Collection[str] = ()) -> Table:
    """Return a row for each method of a sweep: its best setting on validation, and the ties with it.

    `evaluated` are the names of the inputs of the run's evaluation, by which methods are named.
    """
    methods = CHOSEN | swept_methods(evaluated)
    n = sweep["n_validation"]
    table = Table("classifier", title=f"the sweep: {len(sweep['trials'])} settings")
    for title in ("images per class", "real weight", "l2", f"validation top-1 (n={n})", "as good"):
        table.add_column(title, justify="right")
    for method, best in sweep["chosen"].items():
        trials = [trial for trial in sweep["trials"] if trial["method"] == method]
        top1 = best["validation_top1"]
        error = None if top1 is None else math.sqrt(top1 * (1 - top1) / n)
        table.add_row(
            METHODS[methods[method]].name,
            f"{best['images_per_class'] or '-'}{images_of_trial(best)}",
            str(best["real_weight"]),
            f"{best['l2']:g}",
            "-" if top1 is None or error is None else f"{top1:.3f} +- {error:.3f}",
            "-" if error is None else _ties(trials, best, error),
        )
    if n:
        table.caption = (
            "as good: other settings of the method within a standard error of the best; the error is that of "
            "one accuracy over these images. Where there are any, call it a tie."
        )
    return table


def _ties(trials: Sequence[TrialShard], best: TrialShard, error: float) -> str:
    others = [trial for trial in trials if trial["shard"] != best["shard"]]
    least = (best["validation_top1"] or 0.0) - error
    within = sum((trial["validation_top1"] or 0.0) >= least for trial in others)
    return f"{within} of {len(others)} others"
