"""sweep: the best setting of each method, and how many others are as good within the error."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.table import Table

from dpt_ray.evaluation.methods import METHODS
from dpt_ray.evaluation.swept import Swept, by_setting
from dpt_ray.learners.agreement import images_of_trial
from dpt_ray.stages.evaluation import CHOSEN, swept_methods
from dpt_ray.store.records import Manifest


def sweep_table(sweep: Manifest, evaluated: Collection[str] = ()) -> Table:
    """Return a row for each method of a sweep: its best setting on validation, and the ties with it.

    `evaluated` are the names of the inputs of the run's evaluation, by which methods are named.
    """
    methods = CHOSEN | swept_methods(evaluated)
    n, settings = sweep["n_validation"], by_setting(sweep["trials"])
    seeds = max(len(setting.trials) for setting in settings)
    table = Table("classifier", title=f"the sweep: {len(settings)} settings")
    columns = [f"validation top-1 (n={n})"]
    if seeds > 1:
        table.title = f"the sweep: {len(settings)} settings, {len(sweep['trials'])} trials"
        columns = [f"validation top-1, mean of {seeds} seeds", f"+- with the images (n={n})"]
    for title in ("images per class", "real weight", "l2", *columns, "as good"):
        table.add_column(title, justify="right")
    for method, chosen in sweep["chosen"].items():
        of_method = [setting for setting in settings if setting.first["method"] == method]
        best = next(setting for setting in of_method if setting.first["shard"] == chosen["shard"])
        table.add_row(
            METHODS[methods[method]].name,
            f"{chosen['images_per_class'] or '-'}{images_of_trial(chosen)}",
            str(chosen["real_weight"]),
            f"{chosen['l2']:g}",
            *_accuracy(best, n, seeds),
            _ties(of_method, best, n) if n else "-",
        )
    if n:
        table.caption = _caption(seeds)
    return table


def _accuracy(best: Swept, n: int, seeds: int) -> list[str]:
    """Return the cells of the best setting's accuracy and its error, apart where there are several seeds."""
    if best.top1 is None:
        return ["-"] if seeds == 1 else ["-", "-"]
    if seeds == 1:
        return [f"{best.top1:.3f} +- {best.error(n):.3f}"]
    over_seeds = "" if best.stderr is None else f" +- {best.stderr:.3f}"
    return [f"{best.top1:.3f}{over_seeds}", f"{best.error(n):.3f}"]


def _ties(settings: Sequence[Swept], best: Swept, n: int) -> str:
    others = [setting for setting in settings if setting is not best]
    least = (best.top1 or 0.0) - best.error(n)
    within = sum((setting.top1 or 0.0) >= least for setting in others)
    return f"{within} of {len(others)} others"


def _caption(seeds: int) -> str:
    over = "these images" if seeds == 1 else "these images, and over the seeds where there are several"
    return (
        "as good: other settings of the method within a standard error of the best; the error is that of "
        f"one accuracy over {over}. Where there are any, call it a tie."
    )
