"""Ranks of one process: a thread each, whose collectives meet at a barrier. For properties over many splits."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch

TIMEOUT_S = 60.0


class _Done:
    def __init__(self, result):
        self.result = result

    def wait(self):
        return self.result


class Lockstep:
    """Collectives of `world_size` threads: every rank must call the same one, as with a process group."""

    def __init__(self, world_size):
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=TIMEOUT_S)
        self.slots = [None] * world_size

    def _meet(self, rank, tensor):
        self.slots[rank] = tensor.clone()
        self.barrier.wait()
        everyone = torch.stack(self.slots)
        self.barrier.wait()
        return everyone

    def reduce_sum(self, rank):
        def reduce(tensor):
            tensor.copy_(self._meet(rank, tensor).sum(0))
            return _Done(tensor)

        return reduce

    def gather(self, rank):
        return lambda tensor: _Done(self._meet(rank, tensor))

    def run(self, body):
        """Returns [body(rank) for every rank], each in its own thread; the first error is raised."""

        def guarded(rank):
            try:
                torch.set_num_threads(1)
                return body(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.world_size) as pool:
            futures = [pool.submit(guarded, rank) for rank in range(self.world_size)]
            errors = [future.exception() for future in futures]
        real = [error for error in errors if error and not isinstance(error, threading.BrokenBarrierError)]
        for error in real or [error for error in errors if error]:
            raise error
        return [future.result() for future in futures]
