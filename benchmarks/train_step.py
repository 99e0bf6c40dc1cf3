"""What a training step costs: the whole Ray path, a bare loop over the same network, the published setting.

    python benchmarks/train_step.py [--rounds 1] [--steps 80] [--batch 16] [--dim 128] [--depth 4]
    python benchmarks/train_step.py --device cuda --batches 256 128 512 --steps 40     # also where CUDA is

On the CPU each loop runs in a process of its own with one thread a worker, the loops in turn:
- bare: data in memory, fused AdamW, foreach EMA, nothing logged;
- ours: training.loop.train on mapped moments in random order, with logs and random numbers by position;
- ray: the same through stages/train_diffusion and Ray Train, its speed read from the training's log;
- published: gradient checkpointing, an EMA parameter by parameter, the loss fetched every step, a file
  for each latent read by a DataLoader.
Two workers are held against two bare loops at once, which tell each other nothing.

With --device (it needs neither Ray nor pyarrow) the loops of one process are measured, on a GPU with
U-ViT-L/2 at 256: compiled and not, in the first batch size and then in the others, and torch.profiler lists
what takes the time. They run in bfloat16 where the device is faster with it.
Writes benchmarks/results/train_step[_cuda]_DATE.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import mean

from processes import ONE_THREAD, Facts, apart
from train_loops import EVERY, LOOPS, SETTLED, Options, bare, network, write_latents

RESULTS = Path(__file__).parent / "results"


# On the CPU: each in a process of its own ----------------------------------------------------------


def alone(loop: str, options: Options, folder: Path, workers: int = 1, at_once: int = 1) -> list[Facts]:
    """`loop` in processes of its own, so many at once; a global batch has `options.batch` for each worker."""
    command = [__file__, f"--only={loop}", f"--folder={folder}", f"--workers={workers}"]
    told = {"steps": options.steps, "dim": options.dim, "depth": options.depth}
    command += [f"--{key}={value}" for key, value in told.items()] + [f"--batch={options.batch * workers}"]
    return apart(command, [ONE_THREAD] * at_once)


def on_the_cpu(options: Options, folder: Path) -> str:
    """Rounds of all loops in turn, as Markdown."""
    found: dict[tuple[str, int], list[Facts]] = {}

    def add(name: str, workers: int, facts: list[Facts]) -> None:
        total = {**facts[0], "images_per_s": sum(one["images_per_s"] for one in facts)}
        found.setdefault((name, workers), []).append(total)

    for _ in range(options.rounds):
        add("bare", 1, alone("bare", options, folder))
        add("ray", 1, alone("ray", options, folder))
        add("ours", 1, alone("ours", options, folder))
        add("published", 1, alone("published", options, folder))
        add("bare", 1, alone("bare", options, folder))  # the machine may have changed meanwhile
        add("bare", 2, alone("bare", options, folder, at_once=2))
        add("ray", 2, alone("ray", options, folder, workers=2))
    speed = {key: mean(run["images_per_s"] for run in runs) for key, runs in found.items()}
    names = {
        ("bare", 1): "bare loop",
        ("ours", 1): "`training.loop`",
        ("ray", 1): "`train_diffusion` on Ray Train, 1 worker",
        ("published", 1): "published setting",
        ("bare", 2): "two bare loops at once",
        ("ray", 2): "`train_diffusion` on Ray Train, 2 workers",
    }
    lines = []
    for key, name in names.items():
        runs = found[key]
        waits = [f"{100 * run['data_wait']:.1f}%" for run in runs if "data_wait" in run]
        starts = [f"{run['startup']:.0f} s" for run in runs if "startup" in run]
        ratio = speed[key] / speed["bare", key[1]]
        memory = f"{max(run['memory'] for run in runs) / 1e6:.0f} MB"
        values = [
            f"{speed[key]:.1f}",
            f"{ratio:.2f}",
            ", ".join(waits),
            ", ".join(starts),
            memory,
        ]
        lines.append(f"| {name} | {' | '.join(values)} |")
    step = 1000 * options.batch / speed["bare", 1]
    spread = [f"{run['images_per_s']:.1f}" for run in found["bare", 1]]
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray"))
    arguments = f"--rounds {options.rounds} --steps {options.steps} --batch {options.batch}"
    return f"""# A training step, {datetime.now(UTC):%Y-%m-%d}

`python benchmarks/train_step.py {arguments} --dim {options.dim} --depth {options.depth}`

{os.cpu_count()} cores of {cpu[1] if cpu else platform.machine()}, one thread a worker, {versions}; load \
average at the end {os.getloadavg()[0]:.1f}. A U-ViT (dim {options.dim}, depth {options.depth}, 258 tokens) \
in float32 on latents of 32 x 32, {options.batch} images a worker, {step:.0f} ms a step of the bare loop. \
Medians of readings every {EVERY} steps, the first {SETTLED} left out; start-up apart. The bare loop's own \
runs: {", ".join(spread)} images/s.

| | images/s | of the bare loop | data wait | start-up | peak memory of a process |
|---|---|---|---|---|---|
{chr(10).join(lines)}

The Ray path with 1 worker over the published setting: {speed["ray", 1] / speed["published", 1]:.2f}.
"""


# In one process, on a GPU ------------------------------------------------------------------------


def on_a_device(options: Options, folder: Path) -> str:
    """Every loop without Ray at every batch size, compiled and not; each line is told when it is known."""
    import torch

    from dpt_ray.models.uvit import flops
    from dpt_ray.training.throughput import matmul_peak

    cuda, config = options.device == "cuda", network(options)
    peak, step_flops = matmul_peak(options.device, getattr(torch, options.precision)), 3 * flops(config)
    name = torch.cuda.get_device_name() if cuda else platform.machine()
    text = f"""# A training step on {name}, {datetime.now(UTC):%Y-%m-%d}

`python benchmarks/train_step.py {" ".join(sys.argv[1:])}`

torch {torch.__version__}, {options.precision}, measured matmul peak {peak / 1e12:.3g} TFLOP/s, \
{step_flops / 1e12:.3g} TFLOP for the training step of an image. `ours` is `training.loop`, without Ray.

| loop | batch | compiled | gradient checkpointing | images/s | MFU | data wait | memory |
|---|---|---|---|---|---|---|---|
"""
    said(text)
    first, *others = options.batches
    variants = [("bare", first, False), ("ours", first, False), ("bare", first, True), ("ours", first, True)]
    rows = [row(*variant, options, folder, step_flops, peak) for variant in variants]
    rows.append(row("ours", first, True, options, folder, step_flops, peak, checkpointing=True))
    rows.append(row("published", first, False, options, folder, step_flops, peak, checkpointing=True))
    profiles = ""
    for compiled in (False, True):
        table = profiled(Options(**{**vars(options), "compile": compiled, "batch": first}), folder)
        kind = "compiled" if compiled else "not compiled"
        profiles += said(f"\nWhere the time of the bare loop goes, {kind}:\n\n```\n{table}\n```\n")
    for batch in others:  # last, so that a run cut short has told the most
        rows += [row("ours", batch, kind, options, folder, step_flops, peak) for kind in (False, True)]
    return text + "".join(rows) + profiles


def said(text: str) -> str:
    """The text, written out at once."""
    sys.stdout.write(text)
    sys.stdout.flush()
    return text


def row(
    loop: str,
    batch: int,
    compiled: bool,
    options: Options,
    folder: Path,
    step_flops: float,
    peak: float,
    checkpointing: bool = False,
) -> str:
    """A line of the table: one loop in one of its variants."""
    import torch

    torch.compiler.reset()
    if options.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    told = {"batch": batch, "compile": compiled, "checkpointing": checkpointing}
    begin = f"| {loop} | {batch} | {'yes' if compiled else 'no'} | {'yes' if checkpointing else 'no'} | "
    try:
        facts = LOOPS[loop](Options(**{**vars(options), **told}), folder)
    except torch.cuda.OutOfMemoryError:
        return said(begin + "out of memory | | | |\n")
    speed, memory = facts["images_per_s"], f"{facts['memory'] / 1e9:.1f} GB"
    wait = f"{100 * facts['data_wait']:.2f}%" if "data_wait" in facts else ""
    return said(f"{begin}{speed:.0f} | {100 * speed * step_flops / peak:.1f}% | {wait} | {memory} |\n")


def profiled(options: Options, folder: Path) -> str:
    """torch.profiler's list over a few steps of the bare loop, the first of which are left out."""
    from torch.profiler import ProfilerActivity, profile, schedule

    cuda = options.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    few = {"steps": (SETTLED + 1) * EVERY}
    with profile(activities=activities, schedule=schedule(wait=3, warmup=2, active=5, repeat=1)) as profiler:
        bare(Options(**{**vars(options), **few, "each": profiler.step}), folder)
    by = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60)


def faster_precision() -> str:
    """Return the one of two precisions in which this processor is faster."""
    from dpt_ray.models.precision import bfloat16_gain

    return "bfloat16" if bfloat16_gain() > 1 else "float32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=16, help="images a worker, on the CPU")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--preset", help="a U-ViT by its name in models/uvit.py, instead of dim and depth")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="no Ray: the loops in one process")
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 128, 512], help="with --device")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="with --device")
    parser.add_argument("--only", choices=LOOPS, help="one loop in this process, its measures as JSON")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    parser.set_defaults(compile=False, checkpointing=False)
    options = parser.parse_args(namespace=Options())
    import torch

    if options.only:
        one = {"device": "cpu", "precision": "float32"}
        facts = LOOPS[options.only](Options(**{**vars(options), **one}), options.folder)
        sys.stdout.write(json.dumps(facts))
        return
    if not options.device and torch.cuda.is_available():
        options.device = "cuda"
    if options.device == "cuda" and not options.preset:
        options.preset = "uvit_l_256"
    if not options.precision:
        options.precision = "bfloat16" if options.device == "cuda" else faster_precision()
    with tempfile.TemporaryDirectory() as folder:
        write_latents(Path(folder))
        if options.device:
            text = on_a_device(options, Path(folder))
        else:
            text = said(on_the_cpu(options, Path(folder)))
    RESULTS.mkdir(exist_ok=True)
    kind = f"_{options.device}" if options.device else ""
    (RESULTS / f"train_step{kind}_{datetime.now(UTC):%Y-%m-%d}.md").write_text(text)


if __name__ == "__main__":
    main()
