"""The batches of a training, loaded ahead of the step that needs them: by a thread or by processes."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils.data import DataLoader, Dataset

from dpt_ray.training.workload import Batch

Load = Callable[[int], Batch]


def prefetch(
    load: Load, steps: range, processes: int = 0, pin: bool = False
) -> Generator[tuple[Batch, float], None, None]:
    """Yield `load(step)` for each step in order, and the seconds spent waiting for it.

    A thread loads one step ahead; else so many processes load a batch each, as many steps ahead. Their
    batches come through shared memory: /dev/shm must have room for all of them. With `pin` batches are in
    pinned memory.
    """
    batches = _by_processes(load, steps, processes, pin) if processes else _by_thread(load, steps, pin)
    for _ in steps:
        start = time.perf_counter()
        batch = next(batches)
        yield batch, time.perf_counter() - start


def _by_thread(load: Load, steps: range, pin: bool) -> Iterator[Batch]:
    def loaded(step: int) -> Batch:
        return {name: value.pin_memory() if pin else value for name, value in load(step).items()}

    with ThreadPoolExecutor(max_workers=1) as thread:
        ahead = thread.submit(loaded, steps.start)
        for step in steps:
            batch = ahead.result()
            if step + 1 in steps:
                ahead = thread.submit(loaded, step + 1)
            yield batch


def _by_processes(load: Load, steps: range, processes: int, pin: bool) -> Iterator[Batch]:
    loader = DataLoader(
        _Steps(load),
        batch_size=None,
        sampler=steps,
        num_workers=processes,
        prefetch_factor=1,
        pin_memory=pin,
        worker_init_fn=_only_below(os.getpid()),
        multiprocessing_context="fork",  # the data of `load` are shared, and need not be pickled
        generator=torch.Generator(),  # leave the global one, from which a model may draw, as it is
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _only_below(training: int) -> Callable[[int], None]:
    """Return what ends a process that starts after its training was killed.

    torch's watchdog takes the parent that it finds for the training: then it would wait for ever.
    """

    def check(number: int) -> None:
        if os.getppid() != training:
            os._exit(1)

    return check


class _Steps(Dataset[Batch | Exception]):
    """The batches of a load function by step, or the error in the place of one."""

    def __init__(self, load: Load) -> None:
        self.load = load

    def __getitem__(self, step: int) -> Batch | Exception:
        # Raised here, an error would reach the training with a traceback in its message.
        try:
            return self.load(step)
        except Exception as error:
            error.add_note(traceback.format_exc())
            return error
