"""Other processes on this machine that run trials of the same sweep."""

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from hydra.core.hydra_config import HydraConfig

from dense_heads.recompose import own_overrides

_WORKER = "DENSE_HEADS_SWEEP_WORKER"  # environment variable of a worker: the id of the process that started it


class Workers:
    """Starts `count` processes like this one; all share the machine's threads, and the GPUs one after another."""

    def __init__(self, count: int, folder: Path) -> None:
        """`folder`: the sweep's."""
        self.count, self.folder = count, folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        if self.count:
            threads = max(1, torch.get_num_threads() // (self.count + 1))
            torch.set_num_threads(threads)
            for number in range(1, self.count + 1):
                environment = {**os.environ, _WORKER: str(os.getpid()), "OMP_NUM_THREADS": str(threads), **_gpu(number)}
                self._processes.append(subprocess.Popen(self._command(), env=environment))
        return self

    def _command(self) -> list[str]:
        hydra = HydraConfig.get()
        own = [
            argument
            for source in hydra.runtime.config_sources
            if source.provider == "command-line"
            for argument in ("--config-dir", source.path)
        ]
        typed = own_overrides(hydra.overrides.task)
        return [sys.executable, "-m", "dense_heads", *own, "mode=sweep", *typed, f"run_dir='{self.folder}'"]

    def alive(self) -> bool:
        """Whether one is still there."""
        return any(process.poll() is None for process in self._processes)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self._processes:
            process.terminate()  # of one that has ended: nothing; else it keeps a checkpoint
        for process in self._processes:
            process.wait()


def is_worker() -> bool:
    """Whether another sweep started this process."""
    return _WORKER in os.environ


def is_orphan() -> bool:
    """Whether the process that started this worker is gone."""
    return is_worker() and os.getppid() != int(os.environ[_WORKER])


def _gpu(number: int) -> dict[str, str]:
    count = torch.cuda.device_count()
    if count < 2:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    return {"CUDA_VISIBLE_DEVICES": visible[number % count]}
