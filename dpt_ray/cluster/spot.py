"""Drain this node when AWS announces that it takes the machine back.

    python -m dpt_ray.cluster.spot HEAD:6379

runs beside `ray start` on a spot node (cluster.yaml), asks the machine's metadata service every 5 s, and
ends once Ray has accepted the notice. What a training does with it is in docs/clusters.md.
"""

from __future__ import annotations

import http.client
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence

from dpt_ray.cluster.ray_internals import DRAIN

METADATA = "http://169.254.169.254/latest"
EVERY = 5.0  # seconds; AWS asks for no more
NOTICE = 120.0  # seconds that AWS gives
MARGIN = 10.0  # seconds before the end at which Ray should be done

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never by a proxy


def notice(metadata: str = METADATA) -> bool:
    """Return whether it is announced that the machine will be taken back.

    Source: the EC2 user guide, "Spot Instance interruption notices"; by IMDSv2, which needs a token.
    """
    try:
        token = _read(f"{metadata}/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
        _read(f"{metadata}/meta-data/spot/instance-action", "GET", {"X-aws-ec2-metadata-token": token})
    except (OSError, http.client.HTTPException):  # 404: nothing is announced; or no whole answer
        return False
    return True


def _read(url: str, method: str, headers: dict[str, str]) -> str:
    with _direct.open(urllib.request.Request(url, method=method, headers=headers), timeout=2) as answer:
        return str(answer.read().decode())


def drain_command(address: str, seconds: float) -> list[str]:
    """Return the command that drains this node of the cluster at `address`, to be gone in `seconds`."""
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", *DRAIN, "--address", address),
        *("--reason-message", "spot notice"),
        *("--deadline-remaining-seconds", str(max(1, int(seconds)))),
    ]


def _succeeds(command: Sequence[str]) -> bool:
    return subprocess.run(command).returncode == 0


def watch(address: str, metadata: str = METADATA, run: Callable[[list[str]], bool] = _succeeds) -> None:
    """Wait for a notice and pass it on to Ray, again and again until it is accepted.

    What is left is counted from the last look without a notice: the time in the notice is by AWS's clock.
    """
    before = time.monotonic()
    while True:
        asked = time.monotonic()
        if not notice(metadata):
            before = asked
        elif run(drain_command(address, NOTICE - MARGIN - (time.monotonic() - before))):
            return
        time.sleep(EVERY)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    watch(sys.argv[1])
