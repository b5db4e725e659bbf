import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dense_heads.errors import UserError
from dense_heads.losses.depth import DepthLoss

PARITY = Path(__file__).parents[2] / "../shared/parity/losses-a.safetensors"
OFF = {"sig": 0.0, "gradient": 0.0}
EACH = [{**OFF, name: 1.0} for name in ("sig", "gradient", "ssi", "l1", "huber", "relative")]
NAMES = ["sig", "gradient", "ssi", "l1", "huber", "relative"]


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Depths of 2 images; a third of the target is missing, a whole block of it included."""
    generator = torch.Generator().manual_seed(0)
    depth = 0.2 + 6 * torch.rand(2, 14, 17, generator=generator)
    target = 0.2 + 6 * torch.rand(2, 14, 17, generator=generator)
    target[torch.rand(2, 14, 17, generator=generator) < 0.3] = 0
    target[1, :6, :6] = 0
    return depth.requires_grad_(), target


def in_numpy(batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    depth, target = (tensor.detach().double().numpy() for tensor in batch)
    return depth, target, target > 0


@pytest.mark.skipif(not PARITY.is_file(), reason="parity vectors are not beside the repository")
def test_sig_and_gradient_equal_the_original():
    recorded = load_file(PARITY)
    # 2 images x 1 channel; recorded with targets of at most 10 m
    depth, target = recorded["depth.prediction"][:, 0], recorded["depth.target"][:, 0]
    assert (target > 10).any() and (target == 0).any()  # so that the masks matter
    sig = DepthLoss(sig=1.0, gradient=0.0, max_m=10.0)
    warmup = sig(depth, target)
    torch.testing.assert_close(warmup, recorded["depth.sigloss_max10_warmup"], rtol=1e-5, atol=0)
    torch.testing.assert_close(sig.eval()(depth, target), recorded["depth.sigloss_max10"], rtol=1e-5, atol=0)
    gradient = DepthLoss(sig=0.0, gradient=1.0, max_m=10.0)
    for index in range(2):
        image = slice(index, index + 1)
        expected = recorded[f"depth.gradientloss_max10_image{index}"]
        torch.testing.assert_close(gradient(depth[image], target[image]), expected, rtol=1e-5, atol=0)


def test_sig_by_hand(batch):
    depth, target, valid = in_numpy(batch)
    g = np.log(depth[valid] + 1e-3) - np.log(target[valid] + 1e-3)
    loss = DepthLoss(gradient=0.0, sig_warmup=1)
    assert loss(*batch).item() == pytest.approx(np.sqrt(0.15 * g.mean() ** 2), rel=1e-5)
    assert loss(*batch).item() == pytest.approx(np.sqrt(g.var(ddof=1) + 0.15 * g.mean() ** 2), rel=1e-5)


def test_gradient_runs_over_pixels_of_the_whole_batch(batch):
    depth, target, valid = in_numpy(batch)
    total = 0.0
    for stride in (1, 2, 4, 6):
        d, t, m = (array[:, ::stride, ::stride] for array in (depth, target, valid))
        differences = 0.0
        for image in range(2):
            for y in range(d.shape[1]):
                for x in range(d.shape[2]):
                    for other in ((y + 2, x), (y, x + 2)):
                        if other[0] < d.shape[1] and other[1] < d.shape[2] and m[image, y, x] and m[(image, *other)]:
                            here, there = (image, y, x), (image, *other)
                            g = [np.log(d[at] + 1e-3) - np.log(t[at] + 1e-3) for at in (here, there)]
                            differences += abs(g[0] - g[1])
        total += differences / m.sum()
    loss = DepthLoss(sig=0.0, gradient=1.0)
    assert loss(*batch).item() == pytest.approx(total, rel=1e-5)
    assert total > 1  # the original's is 0 for two images


@pytest.mark.parametrize("shape", [(1, 97, 130), (3, 64, 81), (16, 30, 40)])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sig_and_gradient_on_other_seeds(seed, shape):
    """In float64 and in another form: the variance from sums of squares, differences by slices of shifted images."""
    rng = np.random.default_rng(seed)
    target = np.exp(rng.normal(1, 0.6, shape))
    depth = target * np.exp(rng.normal(0.1, 0.3, shape))
    target[rng.uniform(size=shape) < 0.25] = 0
    depth, target = depth.astype(np.float32), target.astype(np.float32)
    measured = target > 0
    g = np.zeros(shape)
    g[measured] = np.log(depth[measured] + np.float64(1e-3)) - np.log(target[measured] + np.float64(1e-3))
    n, s, s2 = measured.sum(), g.sum(), (g**2).sum()
    sig = np.sqrt((s2 - s**2 / n) / (n - 1) + 0.15 * (s / n) ** 2)
    gradient = 0.0
    for stride in (1, 2, 4, 6):
        own, m = g[:, ::stride, ::stride], measured[:, ::stride, ::stride]
        for axis in (1, 2):
            both = np.delete(m, (0, 1), axis) & np.delete(m, (-1, -2), axis)
            steps = np.abs(np.delete(own, (0, 1), axis) - np.delete(own, (-1, -2), axis))
            gradient += steps[both].sum() / m.sum()
    tensors = torch.from_numpy(depth), torch.from_numpy(target)
    assert DepthLoss(gradient=0.0).eval()(*tensors).item() == pytest.approx(sig, rel=1e-5)
    assert DepthLoss(sig=0.0, gradient=1.0)(*tensors).item() == pytest.approx(gradient, rel=1e-5)
    warm = DepthLoss(gradient=0.0).train()(*tensors).item()
    assert warm == pytest.approx(np.sqrt(0.15) * abs(s / n), rel=1e-5)


def test_ssi_by_hand(batch):
    depth, target, valid = in_numpy(batch)

    def normalised(x: np.ndarray) -> np.ndarray:
        centred = x - np.sort(x)[(len(x) - 1) // 2]  # the lower median
        return centred / np.abs(centred).mean()

    each = []
    for d, t, m in zip(depth, target, valid, strict=True):
        residual = np.sort(np.abs(normalised(d[m]) - normalised(t[m])))
        each.append(residual[: int(0.8 * len(residual))].sum() / (2 * len(residual)))
    assert DepthLoss(**OFF, ssi=1.0)(*batch).item() == pytest.approx(np.mean(each), rel=1e-5)


def test_ssi_sees_neither_scale_nor_shift(batch):
    depth, target = batch
    loss = DepthLoss(**OFF, ssi=1.0)
    plain = loss(depth, target)
    scales, shifts = torch.tensor([0.2, 7.0])[:, None, None], torch.tensor([3.0, 0.5])[:, None, None]
    torch.testing.assert_close(loss(scales * depth + shifts, target), plain, rtol=1e-4, atol=0)
    exact = torch.where(target > 0, 2 * target + 1, 0)
    torch.testing.assert_close(loss(exact, target).item(), 0.0, atol=1e-6, rtol=0)


def test_l1_and_huber_by_hand(batch):
    depth, target, valid = in_numpy(batch)
    error = np.abs(depth - target)[valid]
    assert DepthLoss(**OFF, l1=1.0)(*batch).item() == pytest.approx(error.mean(), rel=1e-5)
    for delta in (0.5, 2.0):
        huber = np.where(error < delta, error**2 / 2, delta * (error - delta / 2)).mean()
        assert DepthLoss(**OFF, huber=1.0, huber_delta=delta)(*batch).item() == pytest.approx(huber, rel=1e-5)


def test_relative_is_abs_rel(batch):
    depth, target, valid = in_numpy(batch)
    expected = np.mean(np.abs(depth - target)[valid] / target[valid])
    assert DepthLoss(**OFF, relative=1.0)(*batch).item() == pytest.approx(expected, rel=1e-5)


def test_the_sum_is_weighted(batch):
    each = [DepthLoss(**arguments)(*batch).item() for arguments in EACH]
    weights = dict(zip(NAMES, [1.0, 0.5, 2.0, 0.25, 3.0, 0.7], strict=True))
    expected = sum(weight * loss for weight, loss in zip(weights.values(), each, strict=True))
    assert DepthLoss(**weights)(*batch).item() == pytest.approx(expected, rel=1e-5)
    published = DepthLoss().eval()(*batch).item()
    assert published == pytest.approx(DepthLoss(1.0, 0.5).eval()(*batch).item(), rel=1e-6)


@pytest.mark.parametrize("arguments", EACH, ids=NAMES)
@pytest.mark.parametrize("nothing", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("predicted", [float("nan"), float("inf"), -7.0, 1e30])
def test_pixels_without_a_measurement_reach_nothing(batch, arguments, nothing, predicted):
    depth, target = batch
    loss = DepthLoss(**arguments).eval()
    expected = loss(depth, target)
    (gradient,) = torch.autograd.grad(expected, depth)
    missing = target == 0
    wild = depth.detach().clone()
    wild[missing] = predicted
    got = loss(wild.requires_grad_(), torch.where(missing, nothing, target))
    got.backward()
    assert torch.equal(got, expected)
    assert torch.equal(wild.grad, gradient)
    assert (wild.grad[missing] == 0).all() and (wild.grad[~missing] != 0).any()


@pytest.mark.parametrize("arguments", [*EACH, {}], ids=[*NAMES, "published"])
def test_a_batch_without_measurements_gives_zero_and_zero_gradients(arguments):
    depth = torch.full((2, 1, 8, 9), float("nan")).requires_grad_()
    loss = DepthLoss(**arguments).eval()(depth, torch.zeros(2, 8, 9))
    loss.backward()
    assert loss.item() == 0 and (depth.grad == 0).all()


@pytest.mark.parametrize("arguments", EACH, ids=NAMES)
@pytest.mark.parametrize("num_valid", [1, 2])
def test_a_pixel_or_two_and_a_perfect_prediction_stay_finite(arguments, num_valid):
    target = torch.zeros(1, 4, 4)
    target.flatten()[:num_valid] = 2.0
    for depth in (torch.full((1, 4, 4), 3.0), target.clone() + (target == 0)):
        depth.requires_grad_()
        loss = DepthLoss(**arguments, sig_warmup=0)(depth, target)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(depth.grad).all()
    assert loss.item() == 0  # the second is perfect


def test_targets_beyond_max_m_are_left_out(batch):
    depth, target = batch
    near = torch.where(target > 3, 0, target)
    assert not torch.equal(near, target)
    assert torch.equal(DepthLoss(max_m=3.0).eval()(depth, target), DepthLoss().eval()(depth, near))


def test_warmup_counts_calls_in_training_only_and_survives_a_checkpoint(batch):
    loss = DepthLoss(gradient=0.0, sig_warmup=3)
    full = loss.eval()(*batch)
    warm = loss.train()(*batch)
    assert warm < full
    assert torch.equal(loss.eval()(*batch), full)  # measured alike whenever, and not counted
    loss.train()(*batch)
    resumed = DepthLoss(gradient=0.0, sig_warmup=3)
    resumed.load_state_dict(copy.deepcopy(loss.state_dict()), strict=True)
    for own in (loss, resumed):
        assert torch.equal(own.train()(*batch), warm)  # the third call
        assert torch.equal(own(*batch), full)


def test_half_precision_and_a_channel_dimension_do_not_matter(batch):
    depth, target = batch
    half = depth.detach().bfloat16()
    loss = DepthLoss(ssi=1.0, l1=1.0, huber=1.0).eval()
    assert torch.equal(loss(half[:, None], target), loss(half.float(), target))
    assert loss(half, target).dtype == torch.float32


@pytest.mark.parametrize("arguments", [*EACH, {}], ids=[*NAMES, "published"])
def test_it_can_be_learnt(arguments):
    generator = torch.Generator().manual_seed(1)
    target = 1 + 4 * torch.rand(1, 8, 8, generator=generator)
    logs = torch.rand(1, 8, 8, generator=generator).requires_grad_()
    loss = DepthLoss(**arguments, sig_warmup=10)
    optimiser = torch.optim.Adam([logs], lr=0.03)
    first = loss.eval()(logs.exp(), target).item()
    loss.train()
    for _ in range(200):
        optimiser.zero_grad()
        loss(logs.exp(), target).backward()
        optimiser.step()
    assert loss.eval()(logs.exp(), target).item() < 0.2 * first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sig": -1.0}, r"loss\.sig=-1\.0"),
        ({"gradient": float("nan")}, r"loss\.gradient=nan"),
        ({"ssi": "much"}, r"loss\.ssi='much'"),
        ({"l1": True}, r"loss\.l1=True"),
        (OFF, "all weights are 0"),
        ({"sig_warmup": -1}, r"sig_warmup=-1"),
        ({"sig_warmup": 0.5}, r"sig_warmup=0\.5"),
        ({"huber_delta": 0.0}, r"huber_delta=0\.0"),
        ({"max_m": float("inf")}, "max_m=inf"),
    ],
)
def test_values_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        DepthLoss(**arguments)


def test_unequal_sizes_are_our_own_mistake():
    with pytest.raises(AssertionError):
        DepthLoss()(torch.ones(2, 4, 4), torch.ones(2, 4, 5))
