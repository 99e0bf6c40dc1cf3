"""What benchmarks of whole commands share: a run of `dpt` in a process of its own, and the result file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from machine import machine

from dpt_ray.config import Config, load_config

RESULTS = Path(__file__).parent / "results"
DIGITS = Path(__file__).parents[1] / "configs" / "digits.yaml"


def dpt(command: str, config: Path, *overrides: str) -> Config:
    """Run a command of `dpt`; return the configuration. Raises RuntimeError with what a failed one said."""
    told = [sys.executable, "-m", "dpt_ray.cli", command, str(config), *overrides]
    done = subprocess.run(told, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(told)}: {done.stderr}")
    return load_config(config, list(overrides))


def write_result(
    name: str, title: str, how: str, columns: Sequence[str], lines: Sequence[str], packages: Sequence[str]
) -> None:
    """Write results/NAME_DATE.md and print it.

    `how` is the command and what it measures, `lines` are those of the table and what follows it.
    """
    date = datetime.now(UTC).date()
    text = "\n".join(
        [
            f"# {title}, {date}",
            "",
            f"{machine(*packages)}. {how}",
            "",
            f"| {' | '.join(columns)} |",
            "|" + "---|" * len(columns),
            *lines,
            "",
        ]
    )
    (RESULTS / f"{name}_{date}.md").write_text(text)
    sys.stdout.write(text)
