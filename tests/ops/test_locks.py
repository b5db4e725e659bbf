"""A lock that ends with its holder."""

import multiprocessing
import os
import signal
import subprocess
import sys

from dense_heads.ops.locks import ProcessLock

HOLD = """
import sys, time
from pathlib import Path
from dense_heads.ops.locks import ProcessLock
assert ProcessLock(Path(sys.argv[1])).acquire(wait=False)
print("held", flush=True)
time.sleep(60)
"""


def hold(path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_waits_until_the_holder_is_killed(tmp_path):
    path = tmp_path / "made" / "lock"
    holder = hold(path)
    lock = ProcessLock(path)
    assert not lock.acquire(wait=False)
    holder.send_signal(signal.SIGKILL)
    with lock:  # waits: a hang is a failure
        pass
    holder.wait()


def test_a_lock_that_was_given_back_is_free(tmp_path):
    path = tmp_path / "lock"
    with ProcessLock(path):
        pass
    hold(path).kill()


def test_a_child_does_not_keep_its_parents_lock(tmp_path):
    """Loaders are forked and may outlive a killed process by seconds."""
    path = tmp_path / "lock"
    code = (
        "import os, sys, time; from pathlib import Path; from dense_heads.ops.locks import ProcessLock\n"
        "ProcessLock(Path(sys.argv[1])).acquire()\n"
        "if os.fork() == 0: print(os.getpid(), flush=True); time.sleep(60)\n"
        "time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    try:
        assert not ProcessLock(path).acquire(wait=False)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        os.kill(child, 0)  # it is alive
        assert ProcessLock(path).acquire(wait=False)
    finally:
        os.kill(child, signal.SIGKILL)


def test_waiting_ends_when_the_holder_gives_back(tmp_path):
    path = tmp_path / "lock"
    context = multiprocessing.get_context("fork")
    order = context.Queue()
    lock = ProcessLock(path)
    lock.acquire()

    def wait():
        with ProcessLock(path):
            order.put("child")

    child = context.Process(target=wait)
    child.start()
    child.join(0.3)
    assert child.is_alive() and order.empty()
    lock.release()
    assert order.get(timeout=20) == "child"
    child.join()
