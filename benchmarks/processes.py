"""Loops of a benchmark in processes of their own: alone, several at once, or as workers of one training."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

Facts = dict[str, Any]
Environment = Mapping[str, str]
CommunicationHook = Callable[[Any, Any], Any]  # (state, GradBucket) -> Future of the bucket's tensor
ONE_THREAD: Environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def apart(command: Sequence[str], processes: Sequence[Environment]) -> list[Facts]:
    """Run a script once in each environment, all at once; return the JSON of their last lines."""
    running = [
        subprocess.Popen(
            [sys.executable, *command], env=os.environ | environment, stdout=subprocess.PIPE, text=True
        )
        for environment in processes
    ]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"{' '.join(command)} failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def workers(count: int, environment: Environment) -> list[Environment]:
    """Return the environments of the workers of one process group on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**environment, **group, "RANK": str(rank)} for rank in range(count)]


def world() -> tuple[int, int]:
    """Return this process's rank, and how many workers its group has: (0, 1) without one."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def replica(model: nn.Module, hook: CommunicationHook | None = None) -> nn.Module:
    """Return the model; with several workers it joins their group over gloo, and is DDP's replica.

    `hook` averages a bucket of gradients in DDP's place.
    """
    import torch

    if world()[1] == 1:
        return model
    torch.distributed.init_process_group("gloo")
    distributed = torch.nn.parallel.DistributedDataParallel(model)
    if hook:
        distributed.register_comm_hook(None, hook)
    return distributed


def mean_and_error(values: Sequence[float]) -> str:
    """Return the mean and its standard error, which a single value does not have."""
    error = f" ± {stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{error}"


def processor_seconds(ancestor: int) -> dict[int, tuple[str, float]]:
    """Return the command's name and the processor seconds of a process and of all that descend from it."""
    found, parents = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, rest = file.read_text().split(" (", 1)
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        name, values = rest.rsplit(") ", 1)
        fields = values.split()
        parents[int(number)] = int(fields[1])
        # utime and stime, fields 14 and 15 of proc(5)
        ticks = int(fields[11]) + int(fields[12])
        found[int(number)] = name, ticks / os.sysconf("SC_CLK_TCK")
    family, known = {ancestor}, 0
    while len(family) > known:
        known = len(family)
        family |= {child for child, parent in parents.items() if parent in family}
    return {number: found[number] for number in family if number in found}
