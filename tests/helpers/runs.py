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


def check_two_workers(found, folder, node, *changes):
    """A training by two workers gives the weights of one, up to rounding."""
    import torch
    from safetensors.torch import load_file

    weights = []
    for workers in (0, 2):
        # Only the denoiser is sharded: for others `fsdp` changes nothing.
        two = (f"compute.train_workers={workers}", "compute.fsdp=true")
        changed = found.copy_to(folder / f"{workers}", *changes, *two)
        make(changed.config, node)
        weights.append(load_file(changed.artifact(node).local_file("model.safetensors")))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4)
