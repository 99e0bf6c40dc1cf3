"""A training of a small network that waits at any step: `python gated_training.py FOLDER COMPUTE`.

The file `gate` holds the number of steps that may be made: what is killed when is then the test's to say.
"""

import json
import sys
import time
from pathlib import Path

ROWS, STEPS = 40, 60
SETTINGS = {
    "steps": STEPS,
    "batch_size": 32,
    "learning_rate": 0.02,
    "weight_decay": 0.03,
    "betas": (0.9, 0.99),
    "warmup_steps": 3,
    "lr_schedule": "cosine",
    "ema_decay": 0.9,
    "grad_clip": 0.5,
    "precision": "float32",
    "seed": 0,
    "checkpoint_every": 10,
    "checkpoint_seconds": 1e9,
    "log_every": 1,
    "diverged_above": 5.0,
}


def gated_task(folder, compute):
    from dpt_ray.config.sections import Compute, Optimisation
    from dpt_ray.store.artifact import Store
    from tests.helpers.toy import task_of, toy_node

    node = toy_node("toy", settings=Optimisation(**SETTINGS))
    return task_of(node, Store(str(folder)), Compute(threads=1, **compute))


def gate(folder):
    return Path(folder, "gate")


def function(folder, **more):
    """The training function, whose batches wait for the gate."""

    def train(task, worker):
        import torch

        from dpt_ray.cluster import training
        from dpt_ray.training.workload import Workload

        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 6))
        data = torch.randn(ROWS, 6)

        def denoise(model, batch, random):
            return (model(batch["x"] + random.normal("noise", (6,))) - batch["x"]).square().mean()

        def load_batch(rows, step):
            while step >= int(gate(folder).read_text()):
                time.sleep(0.02)
            return {"x": data[rows]}

        parts = task.compute.gradient_accumulation
        workload = Workload(model, denoise, load_batch, ROWS, gradient_accumulation=parts, **more)
        training.fit(task, worker, workload)

    return train


if __name__ == "__main__":
    from dpt_ray.cluster import training

    folder, compute = sys.argv[1], json.loads(sys.argv[2])
    training.run(gated_task(folder, compute), function(folder))
