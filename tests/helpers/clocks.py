"""A wall clock that a test moves, for the processes that it starts; their monotonic clocks go on.

All Python code of such a process has it, Ray's too. Ray's C++ core keeps the machine's clock: with
libfaketime in all processes Ray Train did not start a worker in minutes.
"""

import itertools
import os
from pathlib import Path

from tests.helpers.paths import ROOT

DAY = 86400

PATCH = """
import ctypes, datetime, gc, time
from pathlib import Path

offset, real = Path({offset!r}), time.time_ns


def time_ns():
    return real() + int(offset.read_text()) * 10**9


def now(cls, tz=None):
    return cls.fromtimestamp(time.time(), tz)


time.time_ns, time.time = time_ns, lambda: time_ns() / 1e9
[methods] = gc.get_referents(datetime.datetime.__dict__)  # a class of C, whose methods cannot be set
methods["now"] = classmethod(now)
ctypes.pythonapi.PyType_Modified(ctypes.py_object(datetime.datetime))
"""


class Clock:
    """The wall clock of all processes with its `environment`; at first it is right."""

    def __init__(self, folder: Path):
        self._offset = folder / "offset"
        self._jumps = (sign * days * DAY for days in itertools.count(1) for sign in (1, -1))
        self.move(0)
        (folder / "sitecustomize.py").write_text(PATCH.format(offset=str(self._offset)))
        others = (str(ROOT), os.environ.get("PYTHONPATH", ""))
        self.environment = {"PYTHONPATH": os.pathsep.join((str(folder), *others))}

    def move(self, seconds: int) -> None:
        """Set how far it is ahead of the machine's."""
        following = self._offset.with_name("next")
        following.write_text(str(seconds))
        following.replace(self._offset)

    def jump(self) -> None:
        """Set it a day ahead, the next time a day behind, then two days: no two moments look close."""
        self.move(next(self._jumps))
