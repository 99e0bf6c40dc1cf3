"""Sweep stage 3 as a Ray job: `dpt sweep` on the cluster; what the sweep needs is made first.

    ray job submit --working-dir . -- python jobs/run_sweep.py --config configs/digits.yaml output=s3://bucket/prefix

run_pipeline.py says what a submission needs.
"""

from dpt_ray.cli import job

if __name__ == "__main__":
    job("sweep", __doc__ or "")
