import json

import pytest

from dense_heads.data.folds import Patients, draw_folds, read_folds, refuse_leaks
from dense_heads.errors import UserError

EYES = [f"Image_{child:02d}{eye}" for child in range(1, 15) for eye in "LR"]


def test_patients_by_pattern_by_file_and_by_themselves(tmp_path):
    assert Patients(pattern=r"Image_(\d+)[LR]").of(EYES)["Image_03R"] == "03"
    (tmp_path / "p.csv").write_text("case,patient\na,1\nb,1\nc,2\n")
    (tmp_path / "p.json").write_text(json.dumps({"a": 1, "b": 1, "c": 2}))
    for name in ("p.csv", "p.json"):
        assert Patients(file=str(tmp_path / name)).of(["a", "b", "c"]) == {"a": "1", "b": "1", "c": "2"}
    assert Patients().of(["a", "b"]) == {"a": "a", "b": "b"}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pattern": "("}, "no regular expression"),
        ({"pattern": "Image"}, "0 groups"),
        ({"pattern": "a", "file": "b"}, "both set"),
    ],
)
def test_bad_rules(given, words):
    with pytest.raises(UserError, match=words):
        Patients(**given)


def test_cases_without_a_patient_are_named(tmp_path):
    with pytest.raises(UserError, match="strange"):
        Patients(pattern=r"Image_(\d+)").of([*EYES, "strange"])
    (tmp_path / "p.csv").write_text("case,patient\na,1\n")
    with pytest.raises(UserError, match="b"):
        Patients(file=str(tmp_path / "p.csv")).of(["a", "b"])
    (tmp_path / "p.csv").write_text("case\na\n")
    with pytest.raises(UserError, match="two columns"):
        Patients(file=str(tmp_path / "p.csv")).of(["a"])


def test_folds_keep_patients_together_are_even_and_validate_every_case_once():
    patients = Patients(pattern=r"Image_(\d+)[LR]").of(EYES)
    folds = draw_folds(patients, 5, seed=0)
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(EYES)
    for fold in folds:
        assert set(fold["train"]) | set(fold["val"]) == set(EYES) and 4 <= len(fold["val"]) <= 6
        refuse_leaks(fold, patients)
    assert folds == draw_folds(dict(reversed(patients.items())), 5, seed=0)  # whatever the order of the files
    assert folds != draw_folds(patients, 5, seed=1)
    with pytest.raises(UserError, match="2 to 14"):
        draw_folds(patients, 15, seed=0)


def test_a_patient_in_two_splits_is_named_with_the_cases():
    patients = Patients(pattern=r"Image_(\d+)[LR]").of(EYES)
    with pytest.raises(UserError, match="patient 01: Image_01L in train, Image_01R in val"):
        refuse_leaks({"train": ["Image_01L", "Image_02L"], "val": ["Image_01R"]}, patients)


@pytest.mark.parametrize("content", ["{}", "[1]", '[{"train": ["a"]}]', "no json", '[{"train": ["x"], "val": ["b"]}]'])
def test_a_file_of_folds_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "splits_final.json"
    path.write_text(content)
    if content == "{}":
        assert read_folds(path, ["a", "b"]) == []
        return
    with pytest.raises(UserError, match=r"splits_final\.json"):
        read_folds(path, ["a", "b"])
