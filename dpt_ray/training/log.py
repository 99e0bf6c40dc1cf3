"""The log of a training: `log.jsonl` and a TensorBoard event file."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from dpt_ray.store.artifact import Artifact

LOG = "log.jsonl"
EVENTS = "tensorboard/events.out.tfevents.0.training"


def read_log(out: Artifact) -> list[dict[str, float]]:
    """Return the logged records of a training in order of steps."""
    if not out.exists(LOG):
        return []
    return [json.loads(line) for line in out.read_bytes(LOG).decode().splitlines()]


class TrainingLog:
    """The log of a training. Each write replaces the file; resuming drops records after the resumed step."""

    EVERY = 1.0  # seconds between writes

    def __init__(self, out: Artifact, step: int) -> None:
        self._out, self._written = out, 0.0
        self._records = [record for record in read_log(out) if record["step"] <= step]
        self._note: dict[str, float] = {}
        self._events: Events | None = None

    @property
    def last(self) -> dict[str, float]:
        """The newest record."""
        return dict(self._records[-1]) if self._records else {}

    def cut(self, step: int, note: dict[str, float]) -> None:
        """Drop the records after `step` and add `note` to the next record."""
        self._records = [record for record in self._records if record["step"] <= step]
        self._note = note
        self.close()

    def add(self, record: dict[str, float]) -> None:
        """Add a record; write the log unless it was written within the last second."""
        self._records.append(record | self._note)
        self._note = {}
        if self._events:
            self._events.add(self._records[-1])
        if time.monotonic() - self._written > self.EVERY:
            self._write()

    def amend(self, numbers: Mapping[str, float]) -> None:
        """Add numbers to the newest record."""
        if numbers:
            self._records[-1].update(numbers)
            if self._events:
                self._events.add({"step": self._records[-1]["step"], **numbers})

    def flush(self) -> None:
        """Publish the log and the TensorBoard event file."""
        self._write()
        if self._events is None:
            self._events = Events()
            for record in self._records:
                self._events.add(record)
        self._out.write_bytes(EVENTS, self._events.content())

    def close(self) -> None:
        """Close the TensorBoard writer, whose thread would outlive its folder; `flush` opens another."""
        if self._events:
            self._events.close()
        self._events = None

    def _write(self) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in self._records)
        self._out.write_bytes(LOG, lines.encode())
        self._written = time.monotonic()


class Events:
    """A TensorBoard event file with a curve for each number in the records, written in a temporary folder.

    It is published under a fixed name: the file of a resumed training replaces the old one, so no curve
    appears twice.
    """

    def __init__(self) -> None:
        from tensorboardX import SummaryWriter

        self._folder = tempfile.TemporaryDirectory(prefix="dpt_ray-tensorboard-")
        self._writer = SummaryWriter(self._folder.name, write_to_disk=True)

    def add(self, record: Mapping[str, float]) -> None:
        """Add a record."""
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(f"training/{name}", value, int(record["step"]))

    def content(self) -> bytes:
        """Return the event file so far."""
        self._writer.flush()
        [file] = Path(self._folder.name).iterdir()
        return file.read_bytes()

    def close(self) -> None:
        """Close the writer and remove its folder."""
        self._writer.close()
        self._folder.cleanup()
