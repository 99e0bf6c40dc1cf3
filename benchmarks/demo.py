"""What the demo costs: seconds and peak memory of each stage, start-up apart from work.

    python benchmarks/demo.py [--runs 1] [KEY=VALUE ...]

Runs `dpt run configs/digits.yaml` into a fresh folder and reads the manifests. "Start-up" is the time
from a stage's beginning to its first work: starting Ray (once), worker processes, their imports.
Writes benchmarks/results/demo_DATE.md.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def measure(overrides: list[str]) -> tuple[float, list[dict[str, Any]]]:
    """(wall seconds, the manifests of the run by time) of one run from nothing."""
    with tempfile.TemporaryDirectory() as output:
        command = [Path(sys.executable).parent / "dpt", "run", ROOT / "configs/digits.yaml"]
        started = time.perf_counter()
        subprocess.run([*command, f"output={output}", *overrides], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        files = Path(output).glob("store/*/*/manifest*.json")
        manifests = [json.loads(file.read_text()) for file in files]
    return seconds, sorted(manifests, key=lambda manifest: manifest["started"])


def table(seconds: float, manifests: list[dict[str, Any]], overrides: list[str]) -> str:
    """The result as Markdown."""
    # Artifacts of one pass carry the time of the whole pass: count each pass once.
    passes = {(m["started"], m["seconds"]): m for m in manifests}
    startup = sum(m.get("startup_seconds", 0.0) for m in passes.values())
    inside = sum(m["seconds"] for m in passes.values())
    rows = []
    for key, m in passes.items():
        names = "+".join(x["name"] for x in manifests if (x["started"], x["seconds"]) == key)
        startup_seconds = m.get("startup_seconds", 0.0)
        rows.append(f"| {names} | {m['seconds']:.1f} | {startup_seconds:.1f} | {_gigabytes(m)} |")
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "torch"))
    machine = f"{_cores()} cores ({_processor()}), Python {platform.python_version()}, {versions}"
    command = " ".join(["python benchmarks/demo.py", *overrides])
    return "\n".join(
        [
            f"# The demo, {datetime.now(UTC):%Y-%m-%d}",
            "",
            f"`{command}` on {machine}, code {manifests[0]['code']}.",
            "",
            f"Wall time **{seconds:.0f} s**; stages {inside:.0f} s, of which start-up (Ray, worker",
            f"processes, their imports) {startup:.0f} s: **{startup / seconds:.0%}** of the demo.",
            "",
            "| stage | seconds | of which start-up | peak memory of a worker |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _gigabytes(manifest: dict[str, Any]) -> str:
    peak = manifest.get("peak_memory_bytes") or manifest["driver_peak_memory_bytes"]
    return f"{peak / 1e9:.2f} GB"


if __name__ == "__main__":
    text = table(*measure(sys.argv[1:]), sys.argv[1:])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"demo_{datetime.now(UTC):%Y-%m-%d}.md").write_text(text)
    sys.stdout.write(text)
