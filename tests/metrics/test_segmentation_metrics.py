import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score, recall_score

from dense_heads.errors import UserError
from dense_heads.metrics.segmentation import ConfusionMatrix, per_class, scores

NUM_CLASSES = 9
NAMES = [f"class {index}" for index in range(NUM_CLASSES)]


def random_pairs(num: int = 5) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images of different sizes, a fifth ignored; 3 occurs nowhere, 4 only as prediction, 5 only as label."""
    rng = np.random.default_rng(0)
    pairs = []
    for index in range(num):
        size = (20 + index, 33 - index)
        target = rng.choice([0, 1, 2, 5, 6, 7, 8, 255], p=[0.3, 0.2, 0.1, 0.05, 0.05, 0.05, 0.05, 0.2], size=size)
        pred = np.where(rng.random(size) < 0.6, np.minimum(target, 2), rng.choice([0, 1, 2, 4, 6, 7, 8], size=size))
        pairs.append((torch.from_numpy(pred), torch.from_numpy(target)))
    return pairs


def counted(pairs) -> ConfusionMatrix:
    metric = ConfusionMatrix(NUM_CLASSES)
    for pred, target in pairs:
        metric.update(pred, target)
    return metric


def flat(pairs) -> tuple[np.ndarray, np.ndarray]:
    pred = np.concatenate([pred.numpy().ravel() for pred, _ in pairs])
    target = np.concatenate([target.numpy().ravel() for _, target in pairs])
    return pred[target != 255], target[target != 255]


def test_agrees_with_scikit_learn():
    pairs = random_pairs()
    matrix = counted(pairs).compute()
    pred, target = flat(pairs)
    assert matrix.dtype == torch.int64
    assert np.array_equal(matrix.numpy(), confusion_matrix(target, pred, labels=range(NUM_CLASSES)))

    ours = scores(matrix)
    present = np.union1d(pred, target)  # all but class 3
    labelled = np.unique(target)
    assert 3 not in present
    assert 4 in present and 4 not in labelled
    assert ours["miou"] == pytest.approx(jaccard_score(target, pred, labels=present, average="macro"), abs=1e-12)
    assert ours["dice"] == pytest.approx(f1_score(target, pred, labels=present, average="macro"), abs=1e-12)
    assert ours["macc"] == pytest.approx(recall_score(target, pred, labels=labelled, average="macro"), abs=1e-12)
    assert ours["aacc"] == pytest.approx(accuracy_score(target, pred), abs=1e-12)

    table = per_class(matrix, NAMES)
    assert [row["name"] for row in table] == NAMES
    for index, row in enumerate(table):
        if index in present:
            assert row["iou"] == pytest.approx(jaccard_score(target, pred, labels=[index], average="macro"), abs=1e-12)
        else:
            assert math.isnan(row["iou"])
        assert math.isnan(row["acc"]) == (index not in labelled)
    assert table[4]["iou"] == 0.0  # predicted, never labelled: counts against the mean
    assert table[5]["iou"] == 0.0 and table[5]["acc"] == 0.0  # labelled, never predicted


def test_is_one_matrix_over_the_data_set_however_it_is_cut():
    pairs = random_pairs()
    whole = counted(pairs).compute()
    parts = [counted(pairs[:2]), counted(pairs[2:])]
    assert not torch.equal(parts[0].compute(), whole)
    merged = ConfusionMatrix(NUM_CLASSES)
    for part in parts:
        merged.merge_state(part)  # by the reduction that processes use at the end
    assert torch.equal(merged.compute(), whole)
    batch = ConfusionMatrix(NUM_CLASSES)
    batch.update(torch.cat([pred.flatten() for pred, _ in pairs]), torch.cat([target.flatten() for _, target in pairs]))
    assert torch.equal(batch.compute(), whole)


def test_a_result_stays_as_it_was_and_reset_starts_again():
    pairs = random_pairs(2)
    metric = counted(pairs[:1])
    first = metric.compute()
    kept = first.clone()
    metric.update(*pairs[1])
    assert torch.equal(first, kept)
    assert metric.compute().sum() > kept.sum()
    metric.reset()
    metric.update(*pairs[0])
    assert torch.equal(metric.compute(), kept)


def test_ignored_pixels_leave_no_trace_on_either_side():
    target = torch.tensor([[0, 255], [255, 1]])
    pred = torch.tensor([[0, 1], [2, 1]])
    matrix = counted([(pred, target)]).compute()
    assert matrix.sum() == 2
    assert scores(matrix) == {"miou": 1.0, "macc": 1.0, "aacc": 1.0, "dice": 1.0}


def test_nothing_to_measure_is_nan_and_not_zero():
    matrix = counted([(torch.zeros(4, 4, dtype=torch.int64), torch.full((4, 4), 255))]).compute()
    assert all(math.isnan(value) for value in scores(matrix).values())


def test_counts_are_exact_where_floats_are_not():
    metric = ConfusionMatrix(2)
    metric.matrix += torch.tensor([[2**53, 0], [0, 2**24]])  # float64 and float32 cannot tell these from one more
    metric.half()  # a run in half precision
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert metric.compute().tolist() == [[2**53 + 1, 0], [0, 2**24 + 1]]


def test_small_integer_types_do_not_wrap():
    metric = ConfusionMatrix(200)
    metric.update(torch.tensor([199], dtype=torch.uint8), torch.tensor([198], dtype=torch.uint8))
    assert metric.compute()[198, 199] == 1


def test_wrong_labels_and_our_own_mistakes():
    metric = ConfusionMatrix(3)
    with pytest.raises(UserError, match=r"labels from 0 to 7; expected 0 to 2.*task\.num_classes"):
        metric.update(torch.tensor([0, 1]), torch.tensor([0, 7]))
    with pytest.raises(UserError, match="labels from -1 to 0"):
        metric.update(torch.tensor([0, 1]), torch.tensor([0, -1]))
    with pytest.raises(AssertionError):
        metric.update(torch.tensor([0, 3]), torch.tensor([0, 1]))
    with pytest.raises(AssertionError):
        metric.update(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, 2, dtype=torch.int64))
    assert metric.compute().sum() == 0  # nothing was half counted
    with pytest.raises(UserError, match="256 classes"):
        ConfusionMatrix(256)
    with pytest.raises(UserError, match="Got 1 classes"):
        ConfusionMatrix(1)
