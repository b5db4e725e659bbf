"""Splits by patient: folds for cross-validation, and the refusal of a patient in two splits."""

import csv
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dense_heads.data.datasets.base import shorten
from dense_heads.errors import UserError
from dense_heads.ops.seeding import stable_seed

NNUNET_SPLITS = "splits_final.json"


@dataclass(frozen=True)
class Patients:
    r"""Which patient a case is of.

    Args:
        pattern: a regular expression with one group, searched in the case's id: `Image_(\d+)[LR]`.
        file: a CSV of case and patient (first line: names of the two columns), or a JSON object case -> patient.

    With neither, each case is a patient of its own.

    Raises:
        UserError: both are given, or the pattern is none.
    """

    pattern: str | None = None
    file: str | None = None

    def __post_init__(self) -> None:
        if self.pattern is not None and self.file is not None:
            raise UserError("patients.pattern and patients.file are both set; expected one of them.")
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise UserError(f"patients.pattern={self.pattern!r} is no regular expression: {error}.") from error
            if groups != 1:
                raise UserError(
                    f"patients.pattern={self.pattern!r} has {groups} groups; expected one, around the patient's id, as "
                    f"in "
                    r"Image_(\d+)[LR]."
                )

    def of(self, cases: Sequence[str]) -> dict[str, str]:
        """The patient of each case.

        Raises:
            UserError: cases that the pattern or the file says nothing of.
        """
        if self.pattern is None and self.file is None:
            return {case: case for case in cases}
        if self.pattern is not None:
            found = {case: re.search(self.pattern, case) for case in cases}
            known = {case: match[1] for case, match in found.items() if match and match[1]}
            where = f"patients.pattern={self.pattern!r} does not match"
        else:
            table = _read_table(Path(str(self.file)))
            known = {case: table[case] for case in cases if case in table}
            where = f"{self.file} has no line for"
        unknown = [case for case in cases if case not in known]
        if unknown:
            raise UserError(
                f"{where} {len(unknown)} of {len(cases)} cases: {shorten(unknown)}. Expected a patient for each, or "
                "the same patient could be trained on and measured."
            )
        return known


def draw_folds(patients: Mapping[str, str], num: int, seed: int) -> list[dict[str, list[str]]]:
    """`num` folds, each with the cases to train on and to validate on; every case is validated on once.

    Patients in an order drawn by a hash of (seed, patient) go one by one to the fold with the fewest cases, so that
    folds are even and the same on every machine.

    Raises:
        UserError: fewer patients than folds.
    """
    cases: dict[str, list[str]] = defaultdict(list)
    for case, patient in patients.items():
        cases[patient].append(case)
    if not 2 <= num <= len(cases):
        raise UserError(f"{num} folds of {len(cases)} patients; expected 2 to {len(cases)}. Set task.data.folds.num.")
    held: list[list[str]] = [[] for _ in range(num)]
    for patient in sorted(cases, key=lambda p: stable_seed("fold", seed, p)):
        min(held, key=len).extend(cases[patient])
    return [{"train": sorted(set(patients) - set(fold)), "val": sorted(fold)} for fold in held]


def read_folds(path: Path, cases: Sequence[str]) -> list[dict[str, list[str]]]:
    """The folds of nnU-Net's `splits_final.json`: a list of {"train": [...], "val": [...]}.

    Raises:
        UserError: another form, or cases that are not there.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        folds = [{split: [str(case) for case in fold[split]] for split in ("train", "val")} for fold in content]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f'{path}: expected a list of {{"train": [...], "val": [...]}} ({error}).') from error
    known = set(cases)
    for number, fold in enumerate(folds):
        unknown = [case for split in fold.values() for case in split if case not in known]
        if unknown or not fold["train"] or not fold["val"]:
            what = f"names {shorten(unknown)}, which are not in the data" if unknown else "has an empty split"
            raise UserError(f"{path}: fold {number} {what}. Correct the file, or remove it and folds are drawn.")
    return folds


def refuse_leaks(splits: Mapping[str, Sequence[str]], patients: Mapping[str, str]) -> None:
    """Refuse a patient whose cases are in two splits.

    Raises:
        UserError: names the patients and their cases.
    """
    where: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for split, cases in splits.items():
        for case in cases:
            where[patients[case]][split].append(case)
    leaks = {patient: found for patient, found in where.items() if len(found) > 1}
    if leaks:
        told = [
            f"patient {patient}: " + ", ".join(f"{shorten(cases, 3)} in {split}" for split, cases in found.items())
            for patient, found in leaks.items()
        ]
        listing = "\n".join(f"- {line}" for line in told[:5])
        more = f"\n... and {len(told) - 5} more" if len(told) > 5 else ""
        who = "1 patient is" if len(leaks) == 1 else f"{len(leaks)} patients are"
        raise UserError(
            f"{who} in two splits:\n{listing}{more}\nA score on a patient who was trained on means nothing. "
            "Move all cases of a patient into one split, or set task.data.patients if these are not one patient."
        )


def _read_table(path: Path) -> dict[str, str]:
    try:
        if path.suffix.lower() == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("no object case -> patient")
            return {str(case): str(patient) for case, patient in content.items()}
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
        if any(len(row) < 2 for row in rows):
            raise ValueError("a line with less than two columns")
        return {row[0].strip(): row[1].strip() for row in rows[1:]}
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"patients.file={path}: expected a CSV of case and patient, or JSON ({error}).") from error
