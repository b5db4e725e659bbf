"""The data of the medical family: volumes as slices, or images; split by patient."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch.utils.data import Dataset

from dense_heads.build.config import plain
from dense_heads.build.data import Loaded, own_run, training_steps
from dense_heads.build.splits import PatientSplit, split_by_patient
from dense_heads.data.classes import Classes, read_classes
from dense_heads.data.intensity import Intensity
from dense_heads.data.labels import LabelRule
from dense_heads.data.medical import ImageDataset, collate_eval, collate_train
from dense_heads.data.medical_checks import check_images
from dense_heads.data.part import Part
from dense_heads.data.slices import Cut, SliceDataset, VolumeStore
from dense_heads.data.transforms import EvalTransform, TrainPipeline
from dense_heads.data.volume_checks import check_volumes
from dense_heads.errors import UserError, unknown_name
from dense_heads.models.card import read_card
from dense_heads.ops.instances import Objects

KINDS = ("volumes", "images")


def load(cfg: DictConfig, check: bool) -> Loaded:
    """The task's splits as data sets."""
    volumes = has_volumes(cfg)
    split = split_by_patient(cfg)
    rule = label_rule(cfg, split.reader)
    store = VolumeStore(cut(cfg), rule, int(cfg.task.data.keep_mb)) if volumes else None
    if check and store is not None:
        check_volumes(split.samples, store)
    elif check:
        check_images(split.samples, rule)

    def dataset(samples: Sequence[Any], transform: TrainPipeline | EvalTransform) -> Any:
        if not _labelled(samples):
            return None
        if store is not None:
            return SliceDataset(samples, store, transform, seed=cfg.seed)
        return ImageDataset(samples, rule, transform, seed=cfg.seed, **_image_options(cfg))

    steps = TrainPipeline(training_steps(cfg), cfg.data.image_size)
    transform = EvalTransform(**plain(cfg.task.transforms.eval))
    found = _drawn(split, dataset, steps, transform) if split.made else _as_they_are(split, dataset, steps, transform)
    if cfg.fold is not None:
        found["test"] = None  # a fold is measured on the cases that it holds out
    groups = _groups(cfg, found["train"])
    return Loaded(
        train=found["train"],
        val=found["val"],
        test=found["test"],
        support=found["support"],
        groups=groups,
        shares=None if groups is None else [1 - cfg.task.data.foreground, cfg.task.data.foreground],
        collate_train=collate_train,
        collate_eval=collate_eval,
        num_images={name: _num(found[name]) for name in ("train", "val", "test")},
        notes=[*split.reader.notices, *split.notes, *rule.notices],
        made_split=split.made,
        classes=classes(cfg),
        labels=rule,
        settings={"modalities": list(getattr(split.reader, "modalities", ())), "multilabel": bool(cfg.task.multilabel)},
    )


Make = Callable[[Sequence[Any], TrainPipeline | EvalTransform], Any]


def _as_they_are(
    split: PatientSplit, dataset: Make, steps: TrainPipeline, transform: EvalTransform
) -> dict[str, Dataset[Any] | None]:
    """The data's own splits."""
    return {
        "train": dataset(split.samples["train"], steps),
        "val": dataset(split.samples["val"], transform),
        "test": dataset(split.samples["test"], transform),
        "support": dataset(split.samples["train"], transform),
    }


def _drawn(
    split: PatientSplit, dataset: Make, steps: TrainPipeline, transform: EvalTransform
) -> dict[str, Dataset[Any] | None]:
    """A fold: parts of all that can be trained on, so that folds share what is computed of it."""
    assert split.made is not None
    pool = sorted({s.image_id: s for s in (*split.samples["train"], *split.samples["val"])}.values(), key=_case)
    seen = {"train": dataset(pool, steps), "val": dataset(pool, transform)}
    if seen["train"] is None or seen["val"] is None:
        raise UserError("Folds need a label of every case; some have none. Remove these cases from the training split.")
    inside = {
        name: [index for index, sample in enumerate(seen["val"].samples) if _case(sample) in set(split.made[name])]
        for name in ("train", "val")
    }
    return {
        "train": Part(seen["train"], inside["train"]),
        "val": Part(seen["val"], inside["val"]),
        "test": dataset(split.samples["test"], transform),
        "support": Part(seen["val"], inside["train"]),
    }


def _case(sample: Any) -> str:
    """The case that a sample belongs to: itself, or of a slice its volume."""
    return str(getattr(sample, "case", sample).image_id)


def _groups(cfg: DictConfig, train: Any) -> list[list[int]] | None:
    """Training samples by whether they hold foreground, where `data.foreground` says how often these are drawn.

    Raises:
        UserError: no share between 0 and 1.
    """
    share = cfg.task.data.foreground
    if share is None or train is None or cfg.mode != "fit":
        return None
    if not (isinstance(share, int | float) and 0 < share < 1):
        raise UserError(
            f"task.data.foreground={share}; expected a share between 0 and 1, or null for samples as they are."
        )
    flags = [bool(classes) for classes in train.shown()]
    return [[1] if flag else [] for flag in flags] if 0 < sum(flags) < len(flags) else None


def has_volumes(cfg: DictConfig) -> bool:
    """Whether the task's data are volumes.

    Raises:
        UserError: neither volumes nor images.
    """
    if cfg.task.data.kind not in KINDS:
        raise unknown_name("task.data.kind:", str(cfg.task.data.kind), KINDS)
    return bool(cfg.task.data.kind == "volumes")


def objects(cfg: DictConfig) -> Objects | None:
    """How single objects are told apart, where the task has them."""
    return None if cfg.task.instances is None else Objects(cfg.task.instances.method, cfg.task.instances.min_size)


def cut(cfg: DictConfig) -> Cut:
    """How volumes become images."""
    if cfg.task.data.slices not in ("2d", "2.5d"):
        raise unknown_name("task.data.slices:", str(cfg.task.data.slices), ["2d", "2.5d"])
    return Cut(
        plane=cfg.task.data.plane,
        neighbours=int(cfg.task.data.neighbours) if cfg.task.data.slices == "2.5d" else 0,
        in_channels=int(cfg.backbone.get("in_channels", 3)),
        intensity=Intensity(**plain(cfg.task.data.intensity)),
    )


def classes(cfg: DictConfig) -> Classes:
    """Names and colours from the benchmark's folder, else from the data's own `classes.txt`, else numbered."""
    places = [Path(place, "classes.txt") for place in (cfg.task.folder, cfg.data.root) if place]
    return read_classes(next((path for path in places if path.is_file()), None), cfg.task.num_classes)


def label_rule(cfg: DictConfig, reader: Any = None) -> LabelRule:
    """How raw label values become classes; what a run decided holds when it is measured."""
    run = own_run(cfg)
    if cfg.model and run:
        return LabelRule(**read_card(Path(run)).labels)
    settings = plain(cfg.task.data.labels)
    settings["ignore"] = [*settings["ignore"], *getattr(reader, "ignore", ())]
    names = classes(cfg)
    colours = names.colours if names.own_colours and not has_volumes(cfg) and not cfg.task.multilabel else None
    return LabelRule(2 if cfg.task.multilabel else cfg.task.num_classes, colours=colours, **settings)


def _image_options(cfg: DictConfig) -> Mapping[str, Any]:
    if int(cfg.backbone.get("in_channels", 3)) != 3:
        raise UserError(
            f"backbone.in_channels={cfg.backbone.in_channels}: images of task={cfg.task.name} have 3 channels."
        )
    separate = objects(cfg)
    border = cfg.task.instances.border_px if separate is not None and separate.num_outputs == 3 else 0
    return {
        "pixel_mm": cfg.task.data.pixel_mm,
        "border_px": int(border),
        "field_of_view": cfg.task.data.field_of_view,
    }


def _num(dataset: Any) -> int:
    return 0 if dataset is None else len(dataset)


def _labelled(samples: Sequence[Any]) -> bool:
    return bool(samples) and all(s.mask is not None or getattr(s, "label_masks", ()) for s in samples)
