import threading

import pytest
import torch

from dense_heads.ops.threads import map_in_threads

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_are_in_order_and_each_piece_is_computed_alone(two_threads):
    together = threading.Barrier(2)

    def piece(number):
        if number < 2:
            together.wait(10)  # both threads are at work at once
        return number, torch.get_num_threads(), torch.is_grad_enabled(), threading.current_thread().name

    found = map_in_threads(piece, range(5), CPU)
    assert [number for number, *_ in found] == list(range(5))
    assert all(rest[:2] == [1, False] for _, *rest in found)
    assert len({name for *_, name in found}) == 2


def test_the_callers_own_threads_and_those_of_later_ones_stay_as_they_were(two_threads):
    map_in_threads(abs, range(3), CPU)
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert torch.get_num_threads() == 2 and later == [2] and torch.is_grad_enabled()


def test_an_error_comes_back(two_threads):
    with pytest.raises(ZeroDivisionError):
        map_in_threads(lambda number: 1 / number, [1, 0], CPU)
    assert map_in_threads(abs, [-1, -2], CPU) == [1, 2]
