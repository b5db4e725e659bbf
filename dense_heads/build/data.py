"""What the data of all families share: the reader of the on-disk format, and what a run decided about its data."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hydra.utils import instantiate
from omegaconf import DictConfig
from torch.utils.data import Dataset

from dense_heads.data.classes import Classes
from dense_heads.data.datasets.base import Split
from dense_heads.data.unaugmented import without_chance
from dense_heads.errors import UserError
from dense_heads.models.card import read_card
from dense_heads.ops.files import write_atomically

SPLIT_FILE = "split.json"  # in the run folder: the split that was drawn because the data had none


class HasSettings(Protocol):
    """What was decided about labels from the data, to be kept in the card."""

    def settings(self) -> dict[str, Any]:
        """Plain values."""
        ...


@dataclass
class Loaded:
    """A task's data, checked, as data sets; a split that is not there is None."""

    train: Dataset[Any] | None
    val: Dataset[Any] | None
    test: Dataset[Any] | None  # only where it is labelled
    collate_train: Callable[[list[Any]], Any]
    collate_eval: Callable[[list[Any]], Any]
    num_images: dict[str, int]
    notes: list[str]
    made_split: dict[str, list[str]] | None = None
    classes: Classes = field(kw_only=True)
    labels: HasSettings | None = None
    shares: list[float] | None = None  # how often each of the groups is drawn; None: all alike
    groups: list[list[int]] | None = None  # the classes of each training sample, where sampling goes by them
    support: Dataset[Any] | None = None  # training images as evaluation sees them, for heads without training
    settings: dict[str, Any] = field(default_factory=dict)  # what the data decide of the family's model


def make_reader(cfg: DictConfig, **more: Any) -> Any:
    """The reader of the task's on-disk format.

    Raises:
        UserError: no `data.root`, or what the reader says of it.
    """
    if cfg.data.root is None:
        raise UserError(f"data.root is not set, and task={cfg.task.name} knows no place. Set data.root=FOLDER.")
    arguments: dict[str, Any] = {"root": cfg.data.root, "hint": cfg.task.data.how_to_get, **more}
    return instantiate(cfg.task.data.format, _partial_=True)(**arguments)


def kept_split(cfg: DictConfig) -> dict[str, list[str]] | None:
    """What the run drew for itself is drawn no second time; None where it drew nothing from these data."""
    run = own_run(cfg)
    if run is None or not Path(run, SPLIT_FILE).is_file():
        return None
    kept = json.loads(Path(run, SPLIT_FILE).read_text(encoding="utf-8"))
    split: dict[str, list[str]] = kept["split"]
    return split if kept["root"] == str(Path(cfg.data.root).resolve()) else None


def training_steps(cfg: DictConfig) -> dict[str, Any]:
    """The steps of `task.transforms.train` by name; without chance where `data.augment=false`."""
    steps = instantiate(cfg.task.transforms.train)
    return dict(steps) if cfg.data.augment else without_chance(steps)


def read_samples(cfg: DictConfig) -> tuple[Any, dict[str, Sequence[Any]]]:
    """The reader of the task's on-disk format, and the samples of each split; training needs all but a test split.

    Raises:
        UserError: no `data.root`, or a split that this mode needs is not there.
    """
    kept = kept_split(cfg)
    reader = make_reader(cfg, **({} if kept is None else {"split": kept}))
    needed = {"train", "val"} if cfg.mode == "fit" else {"val"}
    splits: tuple[Split, ...] = ("train", "val", "test")
    there = needed | set(reader.available())
    return reader, {split: reader.samples(split) if split in there else [] for split in splits}


def keep_split(folder: Path, cfg: DictConfig, loaded: Loaded) -> None:
    """Keep the split that was drawn for data that had none, with the place of the data."""
    if loaded.made_split is not None:
        content = {"root": str(Path(cfg.data.root).resolve()), "split": loaded.made_split}
        write_atomically(folder / SPLIT_FILE, json.dumps(content, indent=1))


def own_run(cfg: DictConfig) -> str | None:
    """The run that this command goes on with or measures, if it is of the same task."""
    run: str | None = cfg.model or (cfg.resume if cfg.resume != "auto" else cfg.run_dir)
    if cfg.model and read_card(Path(cfg.model)).task != cfg.task.name:
        return None
    return run


def num_measured(cfg: DictConfig, stage: str, num_samples: int) -> int:
    """Of a split's samples those that the trainer's limit (batches, or a share of them) leaves."""
    limit, batch_size = cfg.trainer[f"limit_{stage}_batches"], cfg.data.eval_batch_size
    batches = limit if isinstance(limit, int) else int(limit * math.ceil(num_samples / batch_size))
    return int(min(num_samples, batches * batch_size))
