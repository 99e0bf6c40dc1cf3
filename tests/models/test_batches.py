import weakref

import pytest
import torch

from dpt_ray.models.batches import Batches


class Small:
    """Doubles its images, on a GPU that has room for so many."""

    def __init__(self, room):
        self.room, self.tried = room, []

    def __call__(self, start, stop):
        self.tried.append(stop - start)
        if stop - start > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return 2 * torch.arange(start, stop)


def test_every_image_is_computed_once_in_batches_of_the_size_asked_for():
    gpu = Small(room=100)
    assert Batches(4)(gpu, 10).tolist() == list(range(0, 20, 2))
    assert gpu.tried == [4, 4, 2]


def test_where_memory_runs_out_the_batch_is_halved_and_stays_so():
    gpu, batches = Small(room=5), Batches(16)
    assert batches(gpu, 10).tolist() == list(range(0, 20, 2))
    assert gpu.tried == [10, 5, 5]
    gpu.tried = []
    assert batches(gpu, 12).tolist() == list(range(0, 24, 2))
    assert gpu.tried == [5, 5, 2]


def test_one_image_too_large_is_an_error_of_one_line_that_says_what_to_set():
    gpu = Small(room=0)
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"single image .*2 GiB.*actor_gpus") as error:
        Batches(8)(gpu, 8)
    assert "\n" not in str(error.value)
    assert gpu.tried == [8, 4, 2, 1]


def test_the_rows_are_held_once_while_they_are_computed():
    """Of a thousand classes an actor holds gigabytes of images."""
    alive, most = [], 0

    def compute(start, stop):
        nonlocal most
        part = torch.zeros(stop - start, 1000)
        alive.append(weakref.ref(part))
        most = max(most, sum(found() is not None for found in alive))
        return part

    assert Batches(2)(compute, 20).shape == (20, 1000)
    assert most <= 2
