"""Checks of FID's files, Inception weights and reference npz, without loading a network."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from dpt_ray.store.artifact import local_copy

# pytorch-fid's release "fid_weights"; torch-fidelity's weights-inception-2015-12-05 is the same file.
WEIGHTS = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WEIGHTS_BYTES = 95_628_359
WHERE = (
    f"FID's Inception weights are {WEIGHTS} (sha256 {WEIGHTS_SHA256[:8]}..., {WEIGHTS_BYTES:,} bytes), in "
    "the release fid_weights of github.com/mseitzer/pytorch-fid: fetch that file and give its path"
)
NOT_COMPUTED = (
    f"FID, sFID, Inception Score, KID, precision and recall are not computed: they need {WEIGHTS} (release "
    "fid_weights of github.com/mseitzer/pytorch-fid); give its path as evaluate.inception"
)
POOL = 2048


def check_reference(source: str | Path) -> None:
    """Raise ValueError unless `source` is an npz with `mu` (2048,) and `sigma`, as ADM's or pytorch-fid's.

    `mu_s` and `sigma_s` (for sFID) may be missing. Only the small `mu` is read, which must be finite;
    `FeatureStatistics.load` checks the rest.
    """
    file = local_copy(source)
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{source}: not an npz; give one with mu and sigma")
    try:
        with np.load(file, allow_pickle=False) as npz:
            missing = [key for key in ("mu", "sigma") if key not in npz]
            found = sorted(npz)
            mu = np.empty(0) if missing else npz["mu"]
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{source}: cannot be read ({reason}); give one with mu and sigma") from error
    if missing:
        raise ValueError(
            f"{source}: lacks {missing}, it has {found}; give statistics of FID's Inception, as ADM's "
            "VIRTUAL_imagenet256_labeled.npz"
        )
    if mu.shape != (POOL,):
        raise ValueError(
            f"{source}: mu has shape {mu.shape}; give statistics of FID's Inception, whose mu is ({POOL},)"
        )
    if not np.isfinite(mu).all():
        raise ValueError(f"{source}: mu has values that are not finite; fetch or recompute the file")
