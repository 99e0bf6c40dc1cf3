"""A training of a small network on random vectors, and what it reports."""

from datetime import timedelta

import torch
from torch import distributed, nn

from dpt_ray.training.loop import TrainSettings, train
from dpt_ray.training.workload import Hooks, Worker, Workload

ROWS = 50
DATA = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(0))
SETTINGS = TrainSettings(
    steps=11,
    batch_size=32,
    learning_rate=0.02,
    warmup_steps=3,
    lr_schedule="cosine",
    ema_decay=0.9,
    grad_clip=0.5,
    log_every=1,
    checkpoint_every=4,
    max_bad_steps=3,
)
ALONE = Worker()
TIMES = ("images_per_s", "data_wait", "memory")


def tiny() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator)
    return model


def load(rows, step):
    return {"x": DATA[rows]}


def denoise(model, batch, random):
    return (model(batch["x"] + random.normal("noise", (6,))) - batch["x"]).square().mean()


class Record:
    """What a run reports."""

    def __init__(self) -> None:
        self.logs, self.checkpoints = [], {}

    def log(self, record):
        self.logs.append({k: v for k, v in record.items() if k not in TIMES})

    def checkpoint(self, step, tensors, meta):
        self.checkpoints[step] = tensors, meta


def run(
    settings=SETTINGS,
    step_fn=denoise,
    model=None,
    load_batch=load,
    worker=ALONE,
    resume=None,
    watching=(),
    record=None,
    **workload,
):
    record = record or Record()
    hooks = Hooks(record.log, record.checkpoint, **dict(watching))
    work = Workload(model or tiny(), step_fn, load_batch, ROWS, **workload)
    return train(work, settings, worker, hooks, resume), record


def join_two(rank, folder):
    """Make this process one of two that train together and meet in a folder."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
