import numpy as np
import pytest

from dense_heads.metrics.instances import object_scores
from dense_heads.ops.instances import Objects, components, largest_only, numbered, watershed


def discs(seed, num=9, size=(64, 72)):
    rng = np.random.default_rng(seed)
    rows, columns = np.indices(size)
    objects = np.zeros(size, int)
    for number in range(1, num + 1):
        y, x, r = rng.integers(0, size[0]), rng.integers(0, size[1]), rng.integers(3, 10)
        objects[(rows - y) ** 2 + (columns - x) ** 2 < r**2] = number
    return numbered(objects)


def by_hand(prediction, label):
    """The scores from sets of pixels, object by object."""
    found = [set(np.flatnonzero(prediction == k)) for k in range(1, prediction.max() + 1)]
    true = [set(np.flatnonzero(label == k)) for k in range(1, label.max() + 1)]
    iou = [[len(p & t) / len(p | t) for t in true] for p in found]
    scores = []
    for threshold in np.arange(0.5, 1.0, 0.05).round(2):
        used, tp = set(), 0
        for row in iou:
            for number, value in enumerate(row):
                if value >= threshold and number not in used:
                    used.add(number)
                    tp += 1
                    break
        scores.append(tp / (len(found) + len(true) - tp))
    common = total = 0
    taken = set()
    for number, t in enumerate(true):
        best = max(range(len(found)), key=lambda k: iou[k][number])
        if iou[best][number] == 0:
            total += len(t)
            continue
        taken.add(best)
        common += len(found[best] & t)
        total += len(found[best] | t)
    total += sum(len(p) for k, p in enumerate(found) if k not in taken)
    return {"ap": np.mean(scores), "ap50": scores[0], "aji": common / total}


@pytest.mark.parametrize("seed", range(4))
def test_scores_by_hand(seed):
    label = discs(seed)
    prediction = numbered(np.roll(label, (seed, 1), axis=(0, 1)) * (np.indices(label.shape)[0] > 6 * seed))
    assert object_scores(prediction, label) == pytest.approx(by_hand(prediction, label))


def test_perfect_and_empty():
    label, nothing = discs(0), np.zeros((64, 72), int)
    assert set(object_scores(label, label).values()) == {1.0}
    assert set(object_scores(nothing, nothing).values()) == {1.0}
    assert set(object_scores(nothing, label).values()) == set(object_scores(label, nothing).values()) == {0.0}


def test_a_watershed_parts_what_touches_and_components_do_not():
    rows, columns = np.indices((40, 60))
    left, right = (rows - 20) ** 2 + (columns - 20) ** 2 < 144, (rows - 20) ** 2 + (columns - 38) ** 2 < 144
    inside = ((rows - 20) ** 2 + (columns - 20) ** 2 < 64) | ((rows - 20) ** 2 + (columns - 38) ** 2 < 64)
    lonely = np.zeros((40, 60), bool)
    lonely[1:4, 50:58] = True  # foreground that nothing is surely inside of
    foreground = (left | right | lonely).astype(float)
    objects = watershed(foreground, 0.9 * inside)
    assert objects.max() == 3 and ((objects > 0) == (foreground > 0)).all()
    assert objects[20, 20] != objects[20, 38] and len(np.unique(objects[lonely])) == 1
    assert components(foreground > 0).max() == 2
    assert components(foreground > 0, min_size=30).max() == 1
    probabilities = np.stack([1 - foreground, 0.9 * inside, foreground - 0.9 * inside])
    np.testing.assert_array_equal(Objects(min_size=0).found(probabilities), objects)


def test_the_largest_part_of_each_class_stays():
    labels = np.zeros((3, 20, 20), np.uint8)
    labels[:, 2:8, 2:8], labels[0, 12:14, 12:14] = 1, 1
    labels[1:, 10:18, 2:6], labels[0, 18, 18] = 2, 2
    kept = largest_only(labels, 3)
    assert (kept[:, 2:8, 2:8] == 1).all() and kept[0, 13, 13] == 0 and kept[0, 18, 18] == 0
    assert (kept == 2).sum() == 2 * 8 * 4
