"""The losses of DINOv2 against values of the original, and against formulas written out here."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dense_heads.heads.dino import DINOHead
from dense_heads.losses.self_supervised import (
    SoftmaxCenter,
    dino_loss,
    ibot_loss,
    koleo_loss,
    relational_loss,
    sinkhorn_knopp,
    teacher_entropy,
)
from tests.factories import DATA

PARITY = DATA.parent / "parity"


@pytest.fixture(scope="module")
def values():
    path = PARITY / "losses-a.safetensors"
    if not path.is_file():
        pytest.skip("no parity vectors")
    return load_file(path)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_sinkhorn_knopp_equals_the_originals(values):
    close(sinkhorn_knopp(values["dino.teacher_logits"], 0.07), values["dino.sinkhorn_0.07"])
    close(sinkhorn_knopp(values["ibot.teacher_logits"], 0.07), values["ibot.sinkhorn_0.07"])


def test_softmax_centring_equals_the_originals(values):
    center = SoftmaxCenter(96)
    center.update(values["dino.teacher_logits"])
    close(center.center, values["dino.center_after_one_update"])
    close(center(values["dino.teacher_logits"], 0.05), values["dino.softmax_center_0.05_after_one_update"])


def test_dino_loss_equals_the_originals(values):
    teacher = values["dino.sinkhorn_0.07"].chunk(2)
    students = [values[f"dino.student_logits.{i}"] for i in range(4)]
    first = sum(dino_loss(student, teacher[0]) for student in students)
    second = sum(dino_loss(student, teacher[1]) for student in students)
    close(first, values["dino.loss_vs_first_half"])
    close(first + second, values["dino.loss_vs_both_halves"])


def test_ibot_loss_equals_the_originals(values):
    masks = values["ibot.masks"].bool()
    close(ibot_loss(values["ibot.student_logits"], values["ibot.sinkhorn_0.07"], masks), values["ibot.loss"])


def test_koleo_equals_the_originals(values):
    close(koleo_loss(values["koleo.input"]), values["koleo.loss"])


def test_the_head_equals_the_originals(values):
    shapes = json.loads((PARITY / "dino-head-a-state-dict-shapes.json").read_text())
    head = DINOHead(48, 96, hidden_dim=64, bottleneck_dim=32)
    assert {key: list(tensor.shape) for key, tensor in head.state_dict().items()} == shapes
    scope = {}
    exec((PARITY / "seeded.py").read_text(), scope)
    head.load_state_dict(scope["seeded_state"]({key: tuple(shape) for key, shape in shapes.items()}))
    close(head(values["head.input"]), values["head.output"])


def test_the_parity_file_holds_nothing_that_is_not_compared(values):
    with safe_open(PARITY / "losses-a.safetensors", "pt") as file:
        families = {key.split(".")[0] for key in file.keys()}
    assert families == {"dino", "ibot", "koleo", "head", "depth"}  # depth: tests/losses/test_depth_loss.py


@pytest.mark.parametrize("rows, prototypes", [(7, 3), (1, 5), (64, 200)])
def test_sinkhorn_knopp_is_the_plain_iteration(rows, prototypes):
    logits = torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(rows)).double()
    q = torch.exp(logits / 0.5).T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True) * prototypes
        q /= q.sum(0, keepdim=True) * rows
    torch.testing.assert_close(sinkhorn_knopp(logits.float(), 0.5).double(), (q * rows).T, rtol=1e-4, atol=1e-6)


def test_sinkhorn_knopp_stays_finite_for_any_logits():
    logits = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).sign() * 1e4
    for scale in (1.0, -1.0):
        found = sinkhorn_knopp(scale * logits, 0.04)
        assert found.isfinite().all()
        torch.testing.assert_close(found.sum(1), torch.ones(32))
    assert sinkhorn_knopp(torch.full((4, 8), 1e4), 0.04).isfinite().all()


def test_sinkhorn_knopp_uses_all_prototypes_where_softmax_uses_one():
    logits = torch.zeros(60, 6)
    logits[:, 0] = 1
    logits += 0.05 * torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    share = sinkhorn_knopp(logits, 0.07).mean(0)
    assert share.max() < 0.25 < (logits / 0.07).softmax(1).mean(0).max()


def test_dino_and_ibot_are_cross_entropies_written_out():
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(6, 5, generator=generator), torch.rand(6, 5, generator=generator)
    teacher /= teacher.sum(1, keepdim=True)

    def single(row):
        scores = [math.exp(float(value) / 0.1) for value in student[row]]
        return -sum(float(t) * math.log(s / sum(scores)) for t, s in zip(teacher[row], scores, strict=True))

    each = [single(row) for row in range(6)]
    assert float(dino_loss(student, teacher)) == pytest.approx(sum(each) / 6, rel=1e-5)
    masks = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()
    expected = (sum(each[:2]) / 2 + sum(each[2:]) / 4) / 3  # the image without a mask counts too
    assert float(ibot_loss(student, teacher, masks)) == pytest.approx(expected, rel=1e-5)


def test_koleo_is_the_mean_log_distance_to_the_nearest_neighbour():
    points = torch.randn(9, 4, generator=torch.Generator().manual_seed(2))
    unit = [[float(v) / math.hypot(*map(float, row)) for v in row] for row in points]
    nearest = [min(math.dist(a, b) for j, b in enumerate(unit) if j != i) for i, a in enumerate(unit)]
    expected = -sum(math.log(d) for d in nearest) / 9
    assert float(koleo_loss(points)) == pytest.approx(expected, rel=1e-4)
    assert float(koleo_loss(points[:1])) == 0.0


def test_koleo_pushes_neighbours_apart():
    points = torch.tensor([[1.0, 0.01], [1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    koleo_loss(points).backward()
    moved = (points - 0.001 * points.grad).detach()
    distance = lambda p: (p[0] / p[0].norm() - p[1] / p[1].norm()).norm()  # noqa: E731
    assert distance(moved) > distance(points.detach())


def test_relations_are_differences_of_cosines_written_out():
    generator = torch.Generator().manual_seed(0)
    features, targets = torch.randn(4, 3, generator=generator), torch.randn(4, 7, generator=generator)

    def cosine(a, b):
        a, b = a.tolist(), b.tolist()
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    expected = sum((cosine(features[i], features[j]) - cosine(targets[i], targets[j])) ** 2 for i, j in pairs) / 12
    assert float(relational_loss(features, targets)) == pytest.approx(expected, rel=1e-5)
    turned = targets @ torch.linalg.qr(torch.randn(7, 7, generator=generator)).Q
    assert float(relational_loss(3 * turned, targets)) < 1e-10


def test_the_centre_acts_from_the_next_batch_on():
    center = SoftmaxCenter(3, momentum=0.9)
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    torch.testing.assert_close(center(logits, 1.0), logits.softmax(1))
    center.update(logits)
    torch.testing.assert_close(center.center, 0.1 * logits)


def test_entropy_says_whether_the_teacher_says_anything():
    assert float(teacher_entropy(torch.full((4, 8), 1 / 8))) == pytest.approx(math.log(8))
    assert float(teacher_entropy(torch.eye(4))) == 0.0


def test_the_gradient_of_the_head_reaches_the_lengths_of_the_prototypes():
    head = DINOHead(8, 5, hidden_dim=16, bottleneck_dim=4)
    head(torch.randn(3, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    assert head.last_layer.weight_g.grad.abs().sum() > 0
    norms = head.last_layer.weight_v.norm(dim=1, keepdim=True)
    rows = head.last_layer.weight_g / norms * head.last_layer.weight_v
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(5))
