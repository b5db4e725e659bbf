"""Which patches of which global crops are hidden from the student (facts sheet 4.1; iBOT, arXiv 2111.07832)."""

import math

import numpy as np
import numpy.typing as npt

from dense_heads.ops.seeding import stable_seed

Bool = npt.NDArray[np.bool_]
ASPECT = 0.3  # blocks are at most 1 / 0.3 times as long as wide
SMALLEST = 4  # patches of a block
TRIES = 10


def block_mask(rows: int, columns: int, target: int, rng: np.random.Generator) -> Bool:
    """(rows, columns) with at most `target` true values, in blocks; fewer where no block fits any more."""
    mask = np.zeros((rows, columns), bool)
    most = rows * columns // 2  # that one block may add
    count = 0
    while count < target:
        added = _add_block(mask, min(target - count, most), rng)
        if added == 0:
            break
        count += added
    return mask


def _add_block(mask: Bool, most: int, rng: np.random.Generator) -> int:
    rows, columns = mask.shape
    for _ in range(TRIES):
        area = rng.uniform(SMALLEST, max(most, SMALLEST))
        aspect = math.exp(rng.uniform(math.log(ASPECT), math.log(1 / ASPECT)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < rows and 0 < width < columns):
            continue
        top, left = rng.integers(0, rows - height + 1), rng.integers(0, columns - width + 1)
        block = mask[top : top + height, left : left + width]
        added = height * width - int(block.sum())
        if 0 < added <= most:
            block[:] = True
            return added
    return 0


def batch_masks(
    num_images: int,
    grid: tuple[int, int],
    seed: int,
    step: int,
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
) -> Bool:
    """(num_images, N): a function of the seed and the step, whatever the number of processes.

    int(num_images * probability) of them have a mask; the j-th of these draws its share of hidden patches from the
    j-th of equal bins of `ratio`.
    """
    rng = np.random.default_rng(stable_seed("masks", seed, step))
    rows, columns = grid
    masks = np.zeros((num_images, rows * columns), bool)
    masked = int(num_images * probability)
    edges = np.linspace(*ratio, masked + 1)
    for place, image in enumerate(rng.permutation(num_images)[:masked]):
        target = int(rows * columns * rng.uniform(edges[place], edges[place + 1]))
        masks[image] = block_mask(rows, columns, target, rng).ravel()
    return masks
