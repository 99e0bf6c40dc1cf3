"""submit: `dpt run` as a Ray job on a cluster, from the folder that the configuration is in or above."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dpt_ray.cluster.jobs import connect_jobs, submit, wait
from dpt_ray.commands.targets import until_node
from dpt_ray.config import ConfigError, load_config
from dpt_ray.config.yaml_file import files_of
from dpt_ray.engine.execute import code_version
from dpt_ray.pipeline.output import check_output_of_job


def submit_run(path: Path, overrides: Sequence[str], until: str | None, waits: bool, follows: bool) -> int:
    """Submit a run, or join the job that makes it already; return the exit code: the job's if waited for.

    What can be checked here is checked before anything is uploaded.
    """
    config = load_config(path, overrides)
    check_output_of_job(config)
    target = until or "report"
    metadata = {
        "run": config.name,
        "stage": target,
        "identity": until_node(config, target).digest,
        "output": config.output or "",
        "compute": config.compute.model_dump_json(exclude_defaults=True),  # its cap among it
        "code": code_version(),
    }
    folder = Path.cwd()
    command = ["python", "-m", "dpt_ray.cli", "run", _inside(path, folder), *overrides]
    client = connect_jobs()
    job = submit(client, config.name, [*command, *(["--until", until] if until else [])], metadata, folder)
    console = Console(stderr=True, highlight=False)
    console.print(f"{'joined' if job.joined else 'submitted'}: {job.id}", soft_wrap=True)
    if not waits and not follows:
        console.print(f"log: ray job logs --follow {job.id}\nstop: ray job stop {job.id}", soft_wrap=True)
        return 0
    try:
        return wait(client, job.id, _write if follows else None)
    except KeyboardInterrupt:
        console.print(f"{job.id} goes on; stop it with `ray job stop {job.id}`", soft_wrap=True)
        raise


def _inside(path: Path, folder: Path) -> str:
    """Return a file's path in the folder that is uploaded."""
    for file in files_of(path):
        if not file.resolve().is_relative_to(folder.resolve()):
            named = str(file) if file == path else f"{file} (a base of {path})"
            raise ConfigError(
                f"{named}: outside the current folder, of which the job gets a copy; submit from a folder "
                "above it"
            )
    return str(path.resolve().relative_to(folder.resolve()))


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
