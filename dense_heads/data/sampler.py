"""Which samples a process sees, and when: functions of the seed and the step, never of history."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from dense_heads.errors import UserError
from dense_heads.ops.seeding import stable_seed


class StepBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for training by steps, from any step on.

    The samples form one endless row: position p stands in epoch p // n at place p % n of that epoch's permutation,
    which depends on (seed, epoch) alone. Step s takes the `batch_size` positions from s * batch_size on, each process
    its contiguous share. So the batches of a run that starts at step s are those of a run that came there from 0, and
    batches neither end nor shrink where an epoch does, also when n < batch_size.

    Args:
        num_samples: n.
        batch_size: of all processes together.
        seed: of the order.
        max_steps: the step (not the number of steps) at which the row ends.
        start_step: the first step that is taken.
        rank, world_size: this process, and how many there are.
        groups: for each sample the classes that it has. An epoch is then no permutation but n draws, each of a class
            and then of a sample that has it, so that rare classes are seen as often as common ones; samples without
            any class count as a class of their own.
        shares: how often each class is drawn, in their order, samples without any class first; None: all alike.

    Raises:
        UserError: no samples, or a batch size that the processes cannot share equally.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        seed: int,
        max_steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        groups: Sequence[Sequence[int]] | None = None,
        shares: Sequence[float] | None = None,
    ) -> None:
        if num_samples < 1:
            raise UserError("There are 0 training samples; expected at least 1. Look at the data set's train split.")
        if batch_size < 1 or batch_size % world_size:
            raise UserError(
                f"data.batch_size is {batch_size} in total and there are {world_size} processes; expected a positive "
                f"multiple of {world_size}. Set data.batch_size={max(1, round(batch_size / world_size)) * world_size}."
            )
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.max_steps, self.start_step = max_steps, start_step
        self.rank, self.world_size = rank, world_size
        self.members = None if groups is None else _members(groups)
        self.shares = shares
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return max(0, self.max_steps - self.start_step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        share = self.batch_size // self.world_size
        for step in range(self.start_step, self.max_steps):
            first = step * self.batch_size + self.rank * share
            yield [self._at(position) for position in range(first, first + share)]

    def _at(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.num_samples)
        if epoch != self._epoch:  # positions only grow, so one permutation at a time is enough
            rng = np.random.default_rng(stable_seed("order", self.seed, epoch))
            self._epoch, self._order = epoch, self._drawn(rng)
        return epoch, int(self._order[place])

    def _drawn(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """The samples of one epoch."""
        if self.members is None:
            return rng.permutation(self.num_samples)
        rows = [rng.permutation(members) for members in self.members]
        used = [0] * len(rows)
        order = np.empty(self.num_samples, dtype=np.int64)
        drawn = rng.integers(len(rows), size=self.num_samples)
        if self.shares is not None:
            drawn = rng.choice(len(rows), size=self.num_samples, p=self.shares)
        for place, chosen in enumerate(drawn):
            order[place] = rows[chosen][used[chosen] % len(rows[chosen])]
            used[chosen] += 1
        return order


def _members(groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """The samples of each class that occurs, and those of none."""
    members: dict[int, list[int]] = {}
    for sample, classes in enumerate(groups):
        for one in set(classes) or {-1}:
            members.setdefault(one, []).append(sample)
    return [members[one] for one in sorted(members)]


class EvalSampler(Sampler[int]):
    """Every `world_size`-th index from `rank` on: over all processes each index once, none repeated to fill up."""

    def __init__(self, num_samples: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices = range(rank, num_samples, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
