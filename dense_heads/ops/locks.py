"""Locks between processes that end with their holder, however it dies."""

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self


class ProcessLock:
    """Held by one process at a time, over a file that stays.

    A POSIX record lock: the system releases it when the holder ends, by SIGKILL too, and the holder's own child
    processes (loaders) do not inherit it, as they would an `flock`. Within one process it excludes nobody.
    """

    def __init__(self, path: Path) -> None:
        """`path`: the lock's own file, made when it is first asked for; nothing else may open it."""
        self.path = path
        self._file: int | None = None

    def acquire(self, wait: bool = True) -> bool:
        """Take the lock; without `wait` say at once whether it is ours."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError):  # which of the two depends on the system
            os.close(file)
            return False
        self._file = file
        return True

    def release(self) -> None:
        """Give it back."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()
