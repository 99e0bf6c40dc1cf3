"""Run a study over label draws and seeds as a Ray job: `dpt study` on the cluster.

    ray job submit --working-dir . -- python jobs/run_study.py --config configs/digits_study.yaml output=s3://bucket/prefix

run_pipeline.py says what a submission needs.
"""

from dpt_ray.cli import job

if __name__ == "__main__":
    job("study", __doc__ or "")
