"""Which labelled images a training-free head looks at."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from dense_heads.data.datasets.base import shorten
from dense_heads.errors import UserError
from dense_heads.heads.base import Head
from dense_heads.heads.training_free import TrainingFreeHead
from dense_heads.ops.seeding import stable_seed


def all_training_free(heads: Sequence[Head]) -> bool:
    """Whether the heads look instead of learn.

    Raises:
        UserError: some do and some do not; they cannot share a run.
    """
    free = [isinstance(head, TrainingFreeHead) for head in heads]
    if any(free) and not all(free):
        raise UserError("head=grid holds heads with and without training; expected one kind. Run them one by one.")
    return all(free)


def refuse_unused_support(cfg: DictConfig) -> None:
    """`support` means nothing to heads that are trained.

    Raises:
        UserError: it is set.
    """
    if cfg.support is not None:
        raise UserError(
            "support is set, but the head is trained on the whole training split. Use head=prototype or "
            "head=patch_knn, or leave support out."
        )


def chosen_support(cfg: DictConfig, dataset: Any, heads: Sequence[Head]) -> list[int]:
    """Indices of the support in the data set of training images.

    `support=N` draws N by the run's seed; where it is known what images show, such that they show each class twice as
    far as possible: once to learn from, once to tell how well that does. A list names images (or whole cases); nothing
    takes what the heads ask for by themselves.

    Raises:
        UserError: another form, more than there are, or a name that is not there.
    """
    wanted = OmegaConf.to_container(cfg.support) if OmegaConf.is_config(cfg.support) else cfg.support
    if wanted is None:
        asked = [head.default_support for head in heads if isinstance(head, TrainingFreeHead)]
        wanted = None if None in asked else max(number for number in asked if number is not None)
    samples = list(dataset.samples)
    if wanted is None:
        return list(range(len(samples)))
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        if not 1 <= wanted:
            raise UserError(f"support={wanted}; expected a number of images from 1 on, or a list of their names.")
        rng = np.random.default_rng(stable_seed("support", cfg.seed))
        shown = dataset.shown()
        able = [index for index in range(len(samples)) if shown is None or shown[index]]
        order = rng.permutation(able).tolist()
        return sorted(order[:wanted] if shown is None else _showing_each_twice(order, shown, wanted))
    if not isinstance(wanted, list) or not wanted:
        raise UserError(f"support={wanted!r}; expected a number of images, or a list of their names: support=[ID,ID].")
    return [index for name in wanted for index in _named(str(name), samples)]


def _showing_each_twice(order: Sequence[int], shown: Sequence[set[int]], num: int) -> list[int]:
    """So many images: first those that show most of what is missing, then of what is shown once, then as they come."""
    rest, chosen, times = list(order), list[int](), Counter[int]()
    for enough in (1, 2):
        while rest and len(chosen) < num:
            gains = [sum(times[number] < enough for number in shown[index]) for index in rest]
            if not any(gains):
                break
            chosen.append(rest.pop(gains.index(max(gains))))  # of equals the first
            times.update(shown[chosen[-1]])
    return [*chosen, *rest[: num - len(chosen)]]


def _named(name: str, samples: Sequence[Any]) -> list[int]:
    """The image of that name, or all images of that case."""
    found = [index for index, sample in enumerate(samples) if sample.image_id == name]
    found = found or [i for i, s in enumerate(samples) if hasattr(s, "case") and s.case.image_id == name]
    if not found:
        raise UserError(
            f"support names {name!r}, which is no training image. There are {len(samples)}: "
            f"{shorten([sample.image_id for sample in samples])}."
        )
    return found
