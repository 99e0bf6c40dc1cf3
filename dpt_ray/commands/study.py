"""study: runs over label draws, labels per class, encoder seeds and variants, and their tables.

Runs share every artifact whose identity they share. They are distributed over processes; the lease of an
artifact decides which process makes what several of them need. What no label changes (features, and a trained
encoder) is made before them, by one process that has the whole machine.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import TypeVar, cast

import pyarrow.compute as pc

from dpt_ray.cluster import session as cluster
from dpt_ray.commands.study_table import figure, table
from dpt_ray.config import Config, ConfigError
from dpt_ray.config.study import Study, load_study
from dpt_ray.data.labels import draw_labels
from dpt_ray.data.units import read_index
from dpt_ray.engine.execute import StageError, code_version, execute
from dpt_ray.engine.node import Node, needed
from dpt_ray.engine.progress import Display
from dpt_ray.evaluation.methods import method_of
from dpt_ray.evaluation.records import EvaluationResult, StudyResult, StudyRun
from dpt_ray.pipeline.flow import flow
from dpt_ray.pipeline.output import open_store
from dpt_ray.pipeline.run import run
from dpt_ray.pipeline.run_folder import shown_json

R = TypeVar("R")


def run_study(path: Path, overrides: Sequence[str], display: Display) -> str:
    """Execute all runs; return the page and where it was written."""
    study, configs = load_study(path, overrides)
    first = next(iter(configs.values()))
    open_store(first)
    started = time.monotonic()
    _check_labels(configs)
    results = _run_all(configs, study.concurrent_runs, display)
    summary: StudyResult = {
        "command": " ".join(["dpt study", str(path), *overrides]),
        "study": study.model_dump(mode="json"),
        "seconds": round(time.monotonic() - started),
        "code": code_version(),
        "runs": results,
    }
    return _publish(study, configs, summary)


def show_study(path: Path, overrides: Sequence[str], results: Path, display: Display) -> str:
    """Write the page and the figure of a finished study from its `study.json`, without its runs.

    Only what the figure's images need is made where it is missing: the first run's samples or index.
    Raises ConfigError where `results` cannot be read or is from another study.
    """
    study, configs = load_study(path, overrides)
    summary = _read_results(results)
    if lacking := [name for name in configs if name not in summary["runs"]]:
        raise ConfigError(
            f"--results: {str(results)!r} lacks run {lacking[0]} ({len(lacking)} of {len(configs)} runs of "
            f"{path}); give the study.json of this study"
        )
    first = next(iter(configs.values()))
    run(first, display, ["samples" if first.generates_images else "index"])
    return _publish(study, configs, summary)


def _read_results(path: Path) -> StudyResult:
    try:
        summary = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--results: {str(path)!r} cannot be read: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(summary, dict) or not {"command", "seconds", "code", "runs"} <= summary.keys():
        raise ConfigError(
            f"--results: {str(path)!r} is not a study.json; give the one that `dpt study` wrote"
        )
    return cast(StudyResult, summary)


def _publish(study: Study, configs: Mapping[str, Config], summary: StudyResult) -> str:
    first_name, first = next(iter(configs.items()))
    name = first_name.rsplit("-n", 1)[0]  # the runs of the base come first
    folder = open_store(first).run_folder(name)
    text = table(study, summary, name, first.sweep or first.retrain_grid)
    picture = figure(study, summary["runs"], first, name)
    folder.write_json("study.json", summary)
    folder.write_bytes("study.md", text.encode())
    folder.write_bytes("study.png", picture)
    return f"{text}\nwritten: {folder.uri}"


def _check_labels(configs: Mapping[str, Config]) -> None:
    """Raise ConfigError for labels that a later run would miss, in training or test images."""
    most: dict[str, tuple[int, str]] = {}  # by the section of the images
    for name, config in configs.items():
        found, data = (config.labels.per_class or 0, name), config.data.model_dump_json()
        most[data] = max(found, most.get(data, found))
    for per_class, name in most.values():
        with _processes(1) as pool:
            _result(name, pool.submit(_check_index, configs[name], per_class), 1)


def _check_index(config: Config, per_class: int) -> None:
    """Make the index of a run, and raise ConfigError where it has too few true labels."""
    node, store = flow(config)["index"], open_store(config)
    execute([node], store, config.compute, Display(), {})
    made = node.artifact(store)
    index = read_index(made, ["id", "split", "label"])
    if not pc.any(pc.and_(pc.equal(index["split"], "test"), pc.is_valid(index["label"]))).as_py():
        raise ConfigError(
            "no labelled test images to compare methods on; set data.test to how many to draw from the "
            "labelled training images"
        )
    try:
        if per_class:
            draw_labels(index, per_class, 0, made.read_json("classes.json"))
    except ValueError as error:
        raise ConfigError(f"study.labels_per_class: {error}") from error


def _run_all(configs: dict[str, Config], workers: int, display: Display) -> dict[str, StudyRun]:
    results: dict[str, StudyRun] = {}
    if workers > 1:  # one run at a time has the whole machine in any case
        _make_shared(configs, display)
    left, going = iter(configs.items()), dict[Future[StudyRun], str]()
    with _processes(workers) as pool:
        try:
            while True:
                # No more than can start: a pool cannot call back what waits, and a run may fail.
                for name, config in islice(left, workers - len(going)):
                    going[pool.submit(_run_one, _sharing(config, workers))] = name
                if not going:
                    break
                for future in wait(going, return_when=FIRST_COMPLETED).done:
                    name = going.pop(future)
                    results[name] = _result(name, future, workers)
                    _show(name, results[name], f"[{len(results)}/{len(configs)}]", display)
        except (ConfigError, StageError) as error:
            if going:
                others = ", ".join(going.values())
                display.console.print(f"{error}; {others} will end first", markup=False, highlight=False)
            raise
    return {name: results[name] for name in configs}


def _processes(number: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(number, mp_context=context, initializer=_end_with_the_study)


def _make_shared(configs: Mapping[str, Config], display: Display) -> None:
    """Make what several runs need and no label changes, in one process: its cluster ends with it."""
    for name, targets in shared(configs).items():
        display.console.print(f"for several runs: {', '.join(targets)}", markup=False, highlight=False)
        with _processes(1) as pool:
            _result(name, pool.submit(_make, configs[name], targets), 1)


def shared(configs: Mapping[str, Config]) -> dict[str, list[str]]:
    """Return the nodes that several runs need and no label changes, by the first run that has them."""
    free: dict[str, list[Node]] = {}
    for name, config in configs.items():
        nodes = flow(config)
        wanted = needed([nodes["evaluation"]])
        if not any(node.missing for node in wanted):  # else the run says what it lacks
            free[name] = [node for node in wanted if nodes["labels"] not in needed([node])]
    uses = Counter(node.reference for unlabelled in free.values() for node in unlabelled)
    found: dict[str, list[str]] = {}
    for name, unlabelled in free.items():
        for node in unlabelled:
            if uses.pop(node.reference, 0) > 1:
                found.setdefault(name, []).append(node.name)
    return found


def _end_with_the_study() -> None:
    """Let this process end when the study's own was killed: it would go on with the runs that it has."""
    study = multiprocessing.parent_process()
    assert study is not None  # this is a process of its pool

    def follow() -> None:
        study.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _sharing(config: Config, runs: int) -> Config:
    """Return the configuration with this machine's threads shared by `runs` concurrent runs."""
    compute = config.compute
    if compute.threads or runs == 1:
        return config
    threads = cluster.threads(compute) // (runs * max(1, compute.actors, compute.train_workers))
    return config.model_copy(update={"compute": compute.model_copy(update={"threads": max(1, threads)})})


def _result(name: str, future: Future[R], workers: int) -> R:
    try:
        return future.result()
    except BrokenProcessPool as error:  # all waiting runs fail with it, so none is named
        raise StageError(
            "a process of the study was killed, probably for lack of memory: lower study.concurrent_runs "
            f"({workers}) or compute.actors; finished artifacts are kept"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"run {name}: {error}") from error
    except Exception as error:
        raise StageError(f"run {name}: {error}") from error


def _show(name: str, result: StudyRun, count: str, display: Display) -> None:
    accuracy = {method_of(row).short: row["test"] for row in result["accuracy"]}
    shown = ", ".join(f"{key} {value:.3f}" for key, value in accuracy.items())
    display.console.print(f"{count} {name}: {shown}", markup=False, highlight=False)


def _make(config: Config, targets: Sequence[str]) -> None:
    """Make nodes of a run in a process of the study, with progress as that of a run."""
    run(config, Display(), ["labels", *targets])  # labels first: a bad number of them is told before any work


def _run_one(config: Config) -> StudyRun:
    """Execute one run in a process of the study; return its evaluation and its artifacts."""
    from rich.console import Console

    _, store = run(config, Display(Console(quiet=True)), ["evaluation"])
    folder = store.run_folder(config.name)
    evaluation: EvaluationResult = shown_json(folder, "evaluation.json")
    return {**evaluation, "artifacts": folder.read_json("artifacts.json")}
