"""Runs in this process that print nothing."""

from rich.console import Console

from dpt_ray.engine.progress import Display
from dpt_ray.pipeline.run import run


def quiet():
    """A display that shows nothing."""
    return Display(Console(quiet=True))


def make(config, *targets):
    """Make the targets (by default the report) with this process as the driver; what was made."""
    return run(config, quiet(), targets or ("report",))[0].made
