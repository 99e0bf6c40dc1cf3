"""Run the whole pipeline as a Ray job: `dpt run` on the cluster.

From the root of a checkout, with the cluster's token at hand (see cluster.yaml):

    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/path/to/token
    export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265
    ray job submit --working-dir . -- python jobs/run_pipeline.py \\
        --config configs/digits.yaml output=s3://bucket/prefix

`dpt submit` does the same under a name that tells run and attempt, and ends with the job's exit code.
`.gitignore` keeps outputs and environments out of the upload. `python` must be one that dpt_ray's
dependencies are installed in; the uploaded code goes before an installed one. The output must be an
absolute path or URI that all nodes reach: a job's own folder is removed after it. A job that failed or
was stopped is continued by submitting it again.
"""

from dpt_ray.cli import job

if __name__ == "__main__":
    job("run", __doc__ or "")
