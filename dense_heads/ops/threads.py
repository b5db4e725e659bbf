"""Independent pieces of work on several threads, each of which computes alone."""

import functools
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> list[Result]:
    """`[function(item) for item in items]` without gradients; on a CPU on as many threads as PyTorch would use.

    PyTorch splits every single operation among its threads and waits for the last one: for thousands of operations on
    data as small as a cache that costs more than the work, and a hundred times more on a machine that others use too.
    Here a thread takes a whole piece, and the result does not depend on the number of threads. One piece alone is
    computed by the caller with all of its threads. `function` must not call this function.
    """
    items = list(items)
    with torch.no_grad():
        if device.type != "cpu" or len(items) == 1:
            return [function(item) for item in items]
        num_threads = torch.get_num_threads()
        pool = _pool(num_threads, os.getpid())
        inference = torch.is_inference_mode_enabled()
        return list(pool.map(functools.partial(_without_gradients, function, inference), items))


def _without_gradients(function: Callable[[Item], Result], inference: bool, item: Item) -> Result:
    with torch.inference_mode(inference), torch.no_grad():  # every thread has modes of its own
        return function(item)


@functools.lru_cache(maxsize=1)
def _pool(num_threads: int, process: int) -> ThreadPoolExecutor:
    """`num_threads` threads that compute alone; those of another process do not outlive a fork."""
    started = threading.Barrier(num_threads + 1)

    def start() -> None:
        torch.get_num_threads()  # takes this thread's number from the default, which happens only once
        torch.set_num_threads(1)  # of this thread, and the default
        started.wait()

    pool = ThreadPoolExecutor(num_threads, "dense_heads", initializer=start)
    for _ in range(num_threads):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(num_threads)  # the default is what it was
    return pool
