"""Batches that are loaded by processes of a worker that Ray Train has started."""

import torch

from dpt_ray.cluster import training
from dpt_ray.store.checkpoints import load_checkpoint
from tests.helpers.gated_training import STEPS, function, gate, gated_task


def test_processes_of_rays_worker_lead_to_the_bits_of_a_thread_without_ray(cluster, tmp_path):
    found = []
    for name, workers, processes in (("thread", 0, 0), ("processes", 1, 2)):
        folder = tmp_path / name
        folder.mkdir()
        gate(folder).write_text(str(STEPS))
        task = gated_task(folder, {"train_workers": workers})
        training.run(task, function(folder, load_processes=processes))
        found.append(load_checkpoint(task.out)[0])
    expected, tensors = found
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
