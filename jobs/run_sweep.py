"""Run the sweep of stage 3 (and what it needs) as a Ray job: `dpt sweep` on the cluster.

From the root of a checkout, with the cluster's token at hand (see cluster.yaml):

    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/path/to/token
    export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265
    ray job submit --working-dir . -- python jobs/run_sweep.py \\
        --config configs/digits.yaml output=s3://bucket/prefix

`.gitignore` keeps outputs and environments out of the upload. `python` must be one that dpt_ray's
dependencies are installed in; the uploaded code goes before an installed one. The output must be an
absolute path or URI that all nodes reach: a job's own folder is removed after it. A job that failed or
was stopped is continued by submitting it again.
"""

import argparse
import sys

from dpt_ray.cli import main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="the YAML file that describes the run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings to change")
    options = parser.parse_args()
    sys.argv = ["dpt", "sweep", options.config, *options.overrides]
    main()
