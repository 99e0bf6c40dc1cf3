"""Where two training workers lose time: the cores, the all-reduce, the training loop, or Ray.

    python benchmarks/two_workers.py [--rounds 3] [--steps 80] [--batch 16] [--dim 128] [--depth 4]

The diffusion step of train_step.py in two processes of one thread each. Each row adds one thing to the row
above, so that the ratio of the two is the cost of it:
- two bare loops at once, which tell each other nothing, against one alone: what the second core is worth
  (1.0 where each process has a core, 0.5 where both share one);
- the same two as workers of one bare DDP training over gloo, without Ray: all-reduce, and one worker's
  waiting for the other at each step;
- training.loop instead of the bare loop, in the same two processes: prefetch, random numbers by position,
  logs, checkpoint;
- stages/denoiser.py on Ray Train: Ray, and what the stage adds (data in shards, the log's file).
All have the allocator settings that Ray's workers have; the last row is two bare loops with malloc's own.
The processor time of Ray's processes is read from /proc over the middle half of the training.

Then torch.profiler looks at one worker of the two trainings without Ray over a few steps. There a barrier
before each all-reduce tells waiting for the other worker from communication; communication then overlaps
with nothing, so that the two are upper bounds where DDP has several buckets.
Writes benchmarks/results/two_workers_DATE.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from common import write_result
from processes import ONE_THREAD, Facts, apart, mean_and_error, processor_seconds, workers
from train_loops import EVERY, FORWARD, LOOPS, SETTLED, Options, write_latents

from dpt_ray.cluster.session import ALLOCATOR

OURS, PLAIN = {**ONE_THREAD, **ALLOCATOR}, ONE_THREAD  # settings of the processes
WAITING, REDUCING = "wait for the other worker", "all-reduce"
SAMPLE = 0.5  # seconds between two looks at Ray's processes
PROFILED = 5  # steps
TABLE_ROWS = 20


# In a process of its own ---------------------------------------------------------------------------


def ray_watched(options: Options, folder: Path) -> Facts:
    """Run the stage; also return how many cores each kind of process of it kept busy meanwhile."""
    looks: list[tuple[float, dict[int, tuple[str, float]]]] = []
    done, started = threading.Event(), time.monotonic()

    def look() -> None:
        while not done.wait(SAMPLE):
            looks.append((time.monotonic(), processor_seconds(os.getpid())))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        facts = LOOPS["ray"](options, folder)
    finally:
        done.set()
        thread.join()
    trained_from = started + facts["startup"]
    length = time.monotonic() - trained_from
    middle = [look for look in looks if 0.25 < (look[0] - trained_from) / length < 0.75]
    (begin, before), (end, after) = middle[0], middle[-1]
    cores: dict[str, float] = {}
    for number in before.keys() & after.keys():
        name, seconds = after[number]
        cores[name] = cores.get(name, 0.0) + (seconds - before[number][1]) / (end - begin)
    return {**facts, "cores": cores}


def in_two_parts(bucket: Any) -> Any:
    """Average a bucket of gradients as DDP does, but wait for the other worker first, for the profile."""
    import torch
    from torch import distributed
    from torch.profiler import record_function

    with record_function(WAITING):
        distributed.barrier()
    with record_function(REDUCING):
        distributed.all_reduce(bucket.buffer().div_(distributed.get_world_size()))
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def profiled(options: Options, folder: Path) -> Facts:
    """Return the shares of a step's time by phase, and the profiler's table, of this worker."""
    from torch.profiler import ProfilerActivity, profile, schedule

    told = {"steps": (SETTLED + 1) * EVERY, "hook": lambda state, bucket: in_two_parts(bucket)}
    when = schedule(wait=EVERY, warmup=2, active=PROFILED, repeat=1)
    with profile(activities=[ProfilerActivity.CPU], schedule=when) as profiler:
        loop = LOOPS[options.profile]
        facts = loop(Options(**{**vars(options), **told, "each": profiler.step}), folder)
    averages = profiler.key_averages()

    def seconds(begin: str) -> float:
        return sum(event.cpu_time_total for event in averages if event.key.startswith(begin)) / 1e6

    # Gradients are averaged within the backward pass, whose nodes are not nested.
    communication = {"waiting": seconds(WAITING), "all-reduce": seconds(REDUCING)}
    backward = seconds("autograd::engine::evaluate_function") - sum(communication.values())
    step = seconds("ProfilerStep")
    parts = {"forward": seconds(FORWARD), "backward": backward, **communication}
    parts["optimizer"] = seconds("Optimizer.step")
    parts["rest"] = step - sum(parts.values())
    table = averages.table(sort_by="self_cpu_time_total", row_limit=TABLE_ROWS, max_name_column_width=50)
    shares = {name: part / step for name, part in parts.items()} | {"data wait": facts.get("data_wait")}
    return {"shares": shares, "step": step / PROFILED, "table": table}


# All of them ---------------------------------------------------------------------------------------

COMMAND_OPTIONS = ("steps", "batch", "dim", "depth")


def command(options: Options, folder: Path, **told: object) -> list[str]:
    values = {**{key: getattr(options, key) for key in COMMAND_OPTIONS}, "folder": folder, **told}
    return [__file__, *(f"--{key}={value}" for key, value in values.items())]


# By the name of a row; each returns the facts of its processes.
Run = Callable[[Options, Path], list[Facts]]
ARMS: dict[str, Run] = {
    "one bare loop": lambda o, f: apart(command(o, f, only="bare"), [OURS]),
    "two bare loops at once": lambda o, f: apart(command(o, f, only="bare"), [OURS] * 2),
    "bare DDP": lambda o, f: apart(command(o, f, only="bare"), workers(2, OURS)),
    "`training.loop`": lambda o, f: apart(command(o, f, only="ours"), workers(2, OURS)),
    "`train_diffusion` on Ray Train": lambda o, f: apart(
        command(o, f, only="ray", workers=2, batch=2 * o.batch), [PLAIN]
    ),
    "two bare loops, malloc's settings": lambda o, f: apart(command(o, f, only="bare"), [PLAIN] * 2),
}
# The row that each is held against, and the number of cores that this row's speed is multiplied by.
AGAINST = {
    "two bare loops at once": ("one bare loop", 2),
    "bare DDP": ("two bare loops at once", 1),
    "`training.loop`": ("bare DDP", 1),
    "`train_diffusion` on Ray Train": ("`training.loop`", 1),
    "two bare loops, malloc's settings": ("two bare loops at once", 1),
}
COLUMNS = ["", "images/s", "of the row it adds to", "of two bare loops"]


def measured(options: Options, folder: Path) -> tuple[list[str], list[Facts]]:
    """Return the lines of the table, the arms having taken turns, and the facts of Ray's runs."""
    speeds: dict[str, list[float]] = {name: [] for name in ARMS}
    of_ray = []
    for _ in range(options.rounds):
        for name, run in ARMS.items():
            facts = run(options, folder)
            speeds[name].append(sum(one.get("images_per_s", 0.0) for one in facts))
            of_ray += [one for one in facts if "cores" in one]
    lines = []
    for name, found in speeds.items():
        ratios = ["", ""]
        if name in AGAINST:
            other, times = AGAINST[name]
            of_other, of_two = speeds[other], speeds["two bare loops at once"]
            ratios = [
                mean_and_error([a / (times * b) for a, b in zip(found, of_other, strict=True)]),
                mean_and_error([a / b for a, b in zip(found, of_two, strict=True)]),
            ]
        lines.append(f"| {' | '.join([name, f'{mean(found):.1f}', *ratios])} |")
    return lines, of_ray


def of_processes(of_ray: list[Facts]) -> list[str]:
    """Return the lines about the processes of Ray's runs, the busiest first."""
    names = {name for facts in of_ray for name in facts["cores"]}
    cores = {name: mean(facts["cores"].get(name, 0.0) for facts in of_ray) for name in names}
    busiest = sorted(cores.items(), key=lambda item: -item[1])
    told = ", ".join(f"{name} {value:.2f}" for name, value in busiest if value > 0.004)
    return ["", f"Cores that the processes of the run on Ray Train kept busy, by name: {told}."]


def of_profiles(options: Options, folder: Path) -> list[str]:
    """Return the lines about one worker of both trainings without Ray."""
    found = {}
    for name, loop in {"bare DDP": "bare", "`training.loop`": "ours"}.items():
        told = command(options, folder, profile=loop)
        found[name] = apart(told, workers(2, OURS))[0]
    phases = list(next(iter(found.values()))["shares"])
    lines = ["", "A profiled step of rank 0, in shares of its time; `data wait` is of the log.", ""]
    lines += [f"| | ms | {' | '.join(phases)} |", "|" + "---|" * (2 + len(phases))]
    for name, facts in found.items():
        shares = [f"{100 * share:.1f}%" if share is not None else "" for share in facts["shares"].values()]
        lines.append(f"| {name} | {1000 * facts['step']:.0f} | {' | '.join(shares)} |")
    for name, facts in found.items():
        lines += ["", f"{name}:", "", "```", facts["table"].strip(), "```"]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=16, help="images a worker")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--only", choices=LOOPS, help="one loop in this process, its measures as JSON")
    parser.add_argument("--profile", choices=("bare", "ours"), help="the same with its profile")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    parser.set_defaults(device="cpu", precision="float32", preset=None, compile=False, checkpointing=False)
    options = parser.parse_args(namespace=Options())
    if options.only or options.profile:
        loops = {**LOOPS, "ray": ray_watched}
        facts = (loops[options.only] if options.only else profiled)(options, options.folder)
        sys.stdout.write(f"\n{json.dumps(facts)}\n")
        return
    with tempfile.TemporaryDirectory() as folder:
        write_latents(Path(folder))
        lines, of_ray = measured(options, Path(folder))
        lines += of_processes(of_ray) + of_profiles(options, Path(folder))
    told = " ".join(f"--{key} {getattr(options, key)}" for key in ("rounds", *COMMAND_OPTIONS))
    how = f"""`python benchmarks/two_workers.py {told}`

A U-ViT (dim {options.dim}, depth {options.depth}) in float32, {options.batch} images a worker, one thread a \
process. Images/s of both processes; medians of readings every {EVERY} steps, the first {SETTLED} left out. \
Means of {options.rounds} rounds with standard errors; ratios are within a round. A row is held against the \
one that it adds to: two bare loops against twice one, DDP against two bare loops, the loop against DDP, Ray \
against the loop."""
    write_result("two_workers", "Two training workers", how, COLUMNS, lines, ("torch", "ray"))


if __name__ == "__main__":
    main()
