"""The set criterion against brute force and against a second computation in plain numbers."""

import itertools
import math

import pytest
import torch

from dense_heads.heads.detr_layers import corrected
from dense_heads.losses.set_prediction import SetCriterion, corrections

WEIGHTS = {"class_weight": 1.5, "box_weight": 0.7, "giou_weight": 2.5}
CLASSES = 4


def boxes(generator, *shape):
    corners = torch.rand(*shape, 2, generator=generator) * 0.6
    return torch.cat([corners, corners + 0.05 + 0.3 * torch.rand(*shape, 2, generator=generator)], dim=-1)


def world(seed, queries=5, objects=(3, 2), gradient=False):
    """What queries say about images, and the images' objects."""
    generator = torch.Generator().manual_seed(seed)
    start = boxes(generator, len(objects), queries)
    deltas = 0.4 * torch.randn(len(objects), queries, 4, generator=generator)
    logits = 2 * torch.randn(len(objects), queries, CLASSES, generator=generator)
    logits.requires_grad_(gradient), deltas.requires_grad_(gradient)
    said = {"logits": logits, "deltas": deltas, "start": start, "boxes": corrected(start, deltas)}
    labels = [torch.randint(CLASSES, (num,), generator=generator) for num in objects]
    return said, [boxes(generator, num) for num in objects], labels


def giou(one, other):
    (ax, ay, ar, ab), (bx, by, br, bb) = one, other
    inner = max(0.0, min(ar, br) - max(ax, bx)) * max(0.0, min(ab, bb) - max(ay, by))
    union = (ar - ax) * (ab - ay) + (br - bx) * (bb - by) - inner
    hull = (max(ar, br) - min(ax, bx)) * (max(ab, bb) - min(ay, by))
    return inner / union - (hull - union) / hull


def distance(start, box, deltas):
    """L1 between what a query says and what it would have to say."""
    (x, y, r, b), (ox, oy, o_r, ob) = start, box
    wanted = [
        ((ox + o_r) - (x + r)) / 2 / (r - x),
        ((oy + ob) - (y + b)) / 2 / (b - y),
        math.log((o_r - ox) / (r - x)),
        math.log((ob - oy) / (b - y)),
    ]
    return sum(abs(ours - theirs) for ours, theirs in zip(deltas, wanted, strict=True))


def focal(logit, right, alpha=0.25, gamma=2.0):
    p = 1 / (1 + math.exp(-logit))
    return -alpha * (1 - p) ** gamma * math.log(p) if right else -(1 - alpha) * p**gamma * math.log(1 - p)


def cost(said, image, query, box, label):
    logit = float(said["logits"][image, query, label])
    start, found, deltas = (said[name][image, query].tolist() for name in ("start", "boxes", "deltas"))
    return (
        WEIGHTS["class_weight"] * (focal(logit, True) - focal(logit, False))
        + WEIGHTS["box_weight"] * distance(start, box.tolist(), deltas)
        - WEIGHTS["giou_weight"] * giou(found, box.tolist())
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("queries", "objects"), [(5, 3), (4, 4), (3, 5), (4, 1)])
def test_the_matching_is_the_cheapest_of_all(seed, queries, objects):
    """Brute force over every way to give objects and queries to each other."""
    said, (own,), (labels,) = world(seed, queries, (objects,))
    costs = [[cost(said, 0, q, own[n], int(labels[n])) for n in range(objects)] for q in range(queries)]
    if queries >= objects:
        ways = (list(zip(way, range(objects), strict=True)) for way in itertools.permutations(range(queries), objects))
    else:
        ways = (list(zip(range(queries), way, strict=True)) for way in itertools.permutations(range(objects), queries))
    best = min(ways, key=lambda pairs: sum(costs[q][n] for q, n in pairs))
    found = SetCriterion(**WEIGHTS).match({name: values[0] for name, values in said.items()}, own, labels)
    assert sorted(zip(*(side.tolist() for side in found), strict=True)) == sorted(best)


@pytest.mark.parametrize("repeat", [1, 2])
def test_the_losses_are_those_of_a_plain_computation(repeat):
    said, own, labels = world(7, queries=6)
    criterion = SetCriterion(**WEIGHTS)
    ours = criterion(said, own, labels, repeat=repeat)
    expected, num = dict.fromkeys(("class", "box", "giou"), 0.0), 0
    for image, (one, kinds) in enumerate(zip(own, labels, strict=True)):
        one, kinds = torch.cat([one] * repeat), torch.cat([kinds] * repeat)
        num += len(one)
        queries, objects = criterion.match({name: values[image] for name, values in said.items()}, one, kinds)
        assert len(set(queries.tolist())) == len(one)  # each copy of an object has a query of its own
        wanted = {(int(q), int(kinds[n])) for q, n in zip(queries, objects, strict=True)}
        for query, label in itertools.product(range(6), range(CLASSES)):
            expected["class"] += focal(float(said["logits"][image, query, label]), (query, label) in wanted)
        for query, place in zip(queries.tolist(), objects.tolist(), strict=True):
            start, found, deltas = (said[name][image, query].tolist() for name in ("start", "boxes", "deltas"))
            expected["box"] += distance(start, one[place].tolist(), deltas)
            expected["giou"] += 1 - giou(found, one[place].tolist())
    assert tuple(ours) == tuple(expected)
    for name, value in expected.items():
        assert float(ours[name]) == pytest.approx(WEIGHTS[f"{name}_weight"] * value / num, rel=1e-4)


def test_without_objects_every_query_is_to_say_nothing():
    said, own, labels = world(1, objects=(0, 0), gradient=True)
    losses = SetCriterion()(said, own, labels)
    assert losses["box"] == 0 and losses["giou"] == 0 and losses["class"] > 0
    sum(losses.values()).backward()
    assert (said["logits"].grad > 0).all()  # down with all of them


def test_a_match_draws_its_query_to_the_object_and_leaves_the_others_boxes_alone():
    said, own, labels = world(2, gradient=True, objects=(1,))
    criterion = SetCriterion()
    (query,), _ = criterion.match({name: values[0] for name, values in said.items()}, own[0], labels[0])
    sum(criterion(said, own, labels).values()).backward()
    moved = said["deltas"].grad[0].abs().sum(dim=1) > 0
    assert moved.nonzero().flatten().tolist() == [int(query)]
    raised = said["logits"].grad[0] < 0
    assert raised.nonzero().tolist() == [[int(query), int(labels[0][0])]]


def test_predictions_that_are_not_finite_are_matched_all_the_same():
    """The loss says what happened; the Hungarian method would only say that its costs are no numbers."""
    said, own, labels = world(3)
    said["logits"][0, 1] = float("nan")
    assert not torch.isfinite(SetCriterion()(said, own, labels)["class"])


def test_corrections_turn_one_box_into_the_other():
    generator = torch.Generator().manual_seed(0)
    start, wanted = boxes(generator, 50), boxes(generator, 50)
    torch.testing.assert_close(corrected(start, corrections(start, wanted)), wanted)
