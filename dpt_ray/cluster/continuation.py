"""Continue a finished training that differs only in having fewer steps."""

from __future__ import annotations

import json
import logging

from dpt_ray.config.sections import Optimisation
from dpt_ray.engine.differences import same_but_for
from dpt_ray.engine.node import Task
from dpt_ray.store.artifact import Artifact
from dpt_ray.store.checkpoints import CHECKPOINTS, checkpoint_names
from dpt_ray.store.records import Facts
from dpt_ray.training.log import LOG, read_log

CONTINUED = "continued.json"


def continue_shorter(task: Task[Optimisation]) -> Facts:
    """Take over the last checkpoint of a finished training that differs only in having fewer steps.

    With a constant learning rate its weights equal this training's at that step; with another schedule
    they do not, and all steps are trained. Return what was done, for the manifest.
    """
    out, settings = task.out, task.settings
    if checkpoint_names(out):
        return out.read_json(CONTINUED) if out.exists(CONTINUED) else {}
    shorter = _shorter(task, settings)
    if not shorter:
        return {}
    steps, digest, source = max(shorter, key=lambda found: found[:2])
    if settings.lr_schedule != "constant":
        reason = f"lr_schedule {settings.lr_schedule} depends on steps"
        logging.getLogger("dpt_ray").info("%s: its %d steps are not reused: %s", digest, steps, reason)
        return {"not_continued": f"{steps} steps of {digest} are not reused: {reason}"}
    name = checkpoint_names(source)[-1]
    every = settings.log_every  # the shorter training always logged its last step
    records = [r for r in read_log(source) if r["step"] <= int(name) and r["step"] % every == 0]
    out.write_bytes(LOG, "".join(json.dumps(record) + "\n" for record in records).encode())
    continued: Facts = {"continued_from": digest, "continued_at_step": int(name)}
    out.write_json(CONTINUED, continued)
    for suffix in (".safetensors", ".json"):  # the JSON last: it publishes the checkpoint
        file = f"{CHECKPOINTS}/{name}{suffix}"
        with out.writing(file) as path:
            source.fs.get_file(source.path(file), str(path))
    return continued


def _shorter(task: Task[Optimisation], settings: Optimisation) -> list[tuple[int, str, Artifact]]:
    """Return (steps, digest, artifact) of the finished trainings that differ in their smaller steps only."""
    return [
        (int(str(steps)), digest, artifact)
        for steps, digest, artifact in same_but_for(task.node, task.out.store, "steps")
        if steps is not None and int(str(steps)) < settings.steps and checkpoint_names(artifact)
    ]
