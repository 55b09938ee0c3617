"""Processes of one command: every item is done once, and all have all outcomes in order."""

import threading
from dataclasses import dataclass

import pytest

from spar.common import process_group as module
from spar.common.errors import InputError, PeerFailure
from spar.common.process_group import ProcessGroup, wrap_distributed_errors
from spar.evaluation.sharing import SharedPipeline


def of(world: int) -> list[ProcessGroup]:
    return [ProcessGroup(rank=rank, world=world) for rank in range(world)]


class Meeting:
    """`all_gather_object` among threads whose names are ranks."""

    def __init__(self, world: int) -> None:
        self.parts, self.barrier = {}, threading.Barrier(world)

    def __call__(self, into: list, own: list) -> None:
        self.parts[int(threading.current_thread().name)] = own
        self.barrier.wait(10)
        into[:] = [self.parts[rank] for rank in range(len(into))]
        self.barrier.wait(10)


def together(world: int, work, monkeypatch) -> list:
    """What `work(group)` gives on each of `world` threads, as if they were processes."""
    meeting, results = Meeting(world), [None] * world
    monkeypatch.setattr(module.dist, "all_gather_object", meeting)

    def run(group: ProcessGroup) -> None:
        results[group.rank] = work(group)

    threads = [threading.Thread(target=run, args=(group,), name=str(group.rank)) for group in of(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 4, 7])
def test_each_item_is_done_by_one_process_and_comes_back_in_order(world, count, monkeypatch):
    items = list(range(count))
    assert sorted(item for group in of(world) for item in group.share(items)) == items

    def squares(group: ProcessGroup) -> list[int]:
        return group.gather_shares([item * item for item in group.share(items)])

    assert together(world, squares, monkeypatch) == [[item * item for item in items]] * world


@dataclass
class Images:
    images: list
    texts: list


class Echo:
    """A pipeline whose images are the inputs that they are made of; it counts what it makes."""

    tasks = ("generate",)

    def __init__(self) -> None:
        self.made = 0

    def _all(self, *columns, **settings) -> Images:
        rows = [(*row, *sorted(settings.items())) for row in zip(*columns, strict=True)]
        self.made += len(rows)
        return Images(rows, rows)

    def generate(self, prompt, *, seed, **settings):
        return self._all(prompt, seed, **settings)

    def edit(self, image, instruction, *, seed, **settings):
        return self._all(image, instruction, seed, **settings)

    def understand(self, image, question, **settings):
        return self._all(image, question, **settings)

    def reconstruct(self, image):
        return self._all(image)

    def classify(self, image, labels, **settings):
        return self._all(image).images


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_shared_pipeline_gives_what_the_pipeline_gives_and_computes_it_once(count, monkeypatch):
    texts, images, seeds = [f"t{i}" for i in range(count)], [f"i{i}" for i in range(count)], list(range(count))

    def calls(pipe) -> list:
        return [
            pipe.generate(texts, seed=seeds, layout=False).images,
            pipe.edit(images, texts, seed=seeds, num_inference_steps=2).images,
            pipe.understand(images, texts).texts,
            pipe.reconstruct(images).images,
            pipe.classify(images, ["a", "b"]),
        ]

    pipes = [Echo() for _ in range(3)]
    shared = together(3, lambda group: calls(SharedPipeline(pipes[group.rank], group)), monkeypatch)
    assert shared == [calls(Echo())] * 3
    assert sum(pipe.made for pipe in pipes) == 5 * count
    one = SharedPipeline(pipes[0], ProcessGroup(world=3))
    assert one.tasks == ("generate",) and one.processes == 3


def test_a_lost_connection_is_said_to_be_a_lost_process():
    with pytest.raises(PeerFailure, match="another process of this run has ended"), wrap_distributed_errors():
        raise RuntimeError("Connection closed by peer [127.0.0.1]:4242")
    with pytest.raises(RuntimeError, match="a size"), wrap_distributed_errors():
        raise RuntimeError("a size that does not fit")


def test_one_process_of_another_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises(InputError, match="OMPI_COMM_WORLD_SIZE: expected processes of torchrun or accelerate"):
        ProcessGroup.meet("cpu")
