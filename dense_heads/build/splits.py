"""Splits by patient: as the data have them, or a fold of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from dense_heads.build.config import plain
from dense_heads.build.data import kept_split, make_reader
from dense_heads.data.datasets.base import Sample
from dense_heads.data.folds import Patients, draw_folds, read_folds, refuse_leaks
from dense_heads.errors import UserError


@dataclass
class PatientSplit:
    """The samples of each split, and how they came there."""

    reader: Any
    samples: dict[str, Sequence[Any]]
    notes: list[str] = field(default_factory=list)
    made: dict[str, list[str]] | None = None  # the ids, where the split is not the data's own
    folds: list[dict[str, list[str]]] | None = None  # all of them, in nnU-Net's form


def split_by_patient(cfg: DictConfig) -> PatientSplit:
    """The task's samples as the data split them, or with `fold=` (or without a validation split) a fold of them.

    Raises:
        UserError: a split that this mode needs is not there, no such fold, a patient in two splits.
    """
    reader = make_reader(cfg)
    found: dict[str, Sequence[Sample]] = {
        name: reader.samples(name) if name in reader.available() else [] for name in ("train", "val", "test")
    }
    patients = Patients(**plain(cfg.task.data.patients)).of([s.image_id for samples in found.values() for s in samples])
    kept = kept_split(cfg)
    split = PatientSplit(reader, dict(found))
    if kept is not None:
        split.made = kept
    elif cfg.fold is not None or (found["train"] and not found["val"]):
        split.folds, source = _folds(cfg, reader, [*found["train"], *found["val"]], patients)
        number = 0 if cfg.fold is None else cfg.fold
        if not (isinstance(number, int) and 0 <= number < len(split.folds)):
            raise UserError(f"fold={cfg.fold}: there are {len(split.folds)} folds, 0 to {len(split.folds) - 1}.")
        split.made = split.folds[number]
        split.notes.append(f"fold {number} of {len(split.folds)}, by patient ({source})")
    if split.made is not None:
        pool = {sample.image_id: sample for sample in (*found["train"], *found["val"])}
        gone = [case for ids in split.made.values() for case in ids if case not in pool]
        if gone:
            raise UserError(f"{len(gone)} cases of the kept split are not in {cfg.data.root}: {', '.join(gone[:5])}.")
        split.samples |= {name: [pool[case] for case in split.made[name]] for name in ("train", "val")}
    refuse_leaks({name: [s.image_id for s in samples] for name, samples in split.samples.items()}, patients)
    for name in ("train", "val") if cfg.mode == "fit" else ("val",):
        if not split.samples[name]:
            reader.samples(name)  # says what is expected where
            raise UserError(f"{cfg.data.root}: no {name} samples; expected at least one.")
    counts = ", ".join(f"{len(samples)} {name}" for name, samples in split.samples.items() if samples)
    split.notes.append(f"cases: {counts}")
    return split


def _folds(
    cfg: DictConfig, reader: Any, pool: Sequence[Sample], patients: dict[str, str]
) -> tuple[list[dict[str, list[str]]], str]:
    """All folds, and where they come from."""
    ids = [sample.image_id for sample in pool]
    file = getattr(reader, "splits_file", None)
    if file is not None and file.is_file():
        return read_folds(file, ids), file.name
    settings = plain(cfg.task.data.folds)
    return draw_folds(
        {i: patients[i] for i in ids}, settings["num"], settings["seed"]
    ), f"drawn, seed {settings['seed']}"
