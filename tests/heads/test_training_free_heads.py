import pytest
import torch
import torch.nn.functional as F

from dense_heads.errors import UserError
from dense_heads.heads.patch_knn import PatchKNNHead
from dense_heads.heads.prototype import PrototypeHead
from dense_heads.heads.training_free import Source, best_offsets, left_out_together, patch_shares
from dense_heads.structures import Features

K, D = 3, 12


def scene(seed, size=(8, 10), noise=0.3):
    """Features in which each class has a direction of its own around a common one; and the mask, 14 pixels a patch."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(K, D, generator=torch.Generator().manual_seed(99))
    patches = torch.zeros(1, *size, dtype=torch.long)
    top, left = torch.randint(0, size[0] - 4, (2,), generator=generator).tolist()
    patches[0, top : top + 3, left : left + 3] = 1
    patches[0, top + 3 : top + 5, left : left + 2] = 2
    map = directions[patches].permute(0, 3, 1, 2) + 4 + noise * torch.randn(1, D, *size, generator=generator)
    mask = patches.repeat_interleave(14, 1).repeat_interleave(14, 2)
    features = Features((map,), (map.mean(dim=(2, 3)),), (size[0] * 14, size[1] * 14))
    return features, {"mask": mask}, patches


def shown(head, seeds):
    for seed in seeds:
        features, batch, _ = scene(seed)
        head.observe(features, batch)
    head.conclude()
    return head


HEADS = {"prototype": lambda **o: PrototypeHead([D], K, **o), "patch_knn": lambda **o: PatchKNNHead([D], K, k=5, **o)}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("num", [1, 4])
def test_what_a_class_looks_like_is_found_again(name, num):
    head = shown(HEADS[name](), range(num))
    for seed in range(50, 54):
        features, _, patches = scene(seed)
        found = head(features).argmax(dim=1)
        assert (found == patches).float().mean() > 0.95


@pytest.mark.parametrize("name", HEADS)
def test_a_state_dict_brings_what_was_seen(name, tmp_path):
    from safetensors.torch import load_file, save_file

    head = shown(HEADS[name](), range(3))
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    other = HEADS[name]()
    other.load_state_dict(load_file(tmp_path / "head.safetensors"))
    features, _, _ = scene(50)
    torch.testing.assert_close(other(features), head(features))


def test_prototypes_by_hand():
    """One image, no grid: the means of the classes' patches, without the image's own mean."""
    head = PrototypeHead([D], K, grid=0, calibrate=False)
    features, batch, patches = scene(0)
    head.observe(features, batch)
    head.conclude()
    unit = F.normalize(features.patch_maps[0], dim=1)[0].flatten(1).T  # (N, D)
    centred = F.normalize(unit - unit.mean(dim=0), dim=1)
    means = torch.stack([F.normalize(centred[patches.flatten() == k].mean(dim=0), dim=0) for k in range(K)])
    expected = 20 * centred @ means.T
    torch.testing.assert_close(head(features)[0].flatten(1).T, expected, atol=1e-4, rtol=1e-4)


def test_local_prototypes_come_from_cells_that_belong_to_a_class():
    head = PrototypeHead([D], K, grid=4, purity=1.0)
    features, batch, _ = scene(0)
    batch["mask"][:] = 0
    batch["mask"][:, : 14 * 4, : 14 * 5] = 1  # a quarter: four of sixteen cells
    batch["mask"][:, -14:, -14:] = 2  # less than a cell
    head.observe(features, batch)
    head.conclude()
    counts = torch.bincount(head.classes, minlength=K).tolist()
    assert counts == [1 + 11, 1 + 4, 1]


def test_nearest_patches_by_hand():
    head = PatchKNNHead([D], K, k=7, temperature=0.1, calibrate=False)
    bank, votes = [], []
    for seed in range(2):
        features, batch, patches = scene(seed)
        head.observe(features, batch)
        bank.append(F.normalize(features.patch_maps[0], dim=1)[0].flatten(1).T)
        votes.append(F.one_hot(patches.flatten(), K).float())
    head.conclude()
    bank, votes = torch.cat(bank), torch.cat(votes)
    mean = bank.mean(dim=0)
    bank = F.normalize(bank - mean, dim=1)
    features, _, _ = scene(7)
    queries = F.normalize(F.normalize(features.patch_maps[0], dim=1)[0].flatten(1).T - mean, dim=1)
    for place in range(0, 80, 7):
        similarity = bank @ queries[place]
        order = similarity.argsort(descending=True)[:7]
        expected = (similarity[order] / 0.1).softmax(0) @ votes[order]
        found = head(features)[0].flatten(1)[:, place].exp()
        torch.testing.assert_close(found, expected.clamp(min=1e-6), atol=1e-4, rtol=1e-4)


def test_faiss_finds_what_torch_finds():
    pytest.importorskip("faiss")
    exact, quick = (shown(PatchKNNHead([D], K, k=5, index=index), range(3)) for index in ("torch", "faiss"))
    features, _, _ = scene(50)
    torch.testing.assert_close(quick(features), exact(features), atol=1e-4, rtol=1e-4)


def test_a_large_bank_is_thinned_out_alike_every_time():
    first, second = (shown(PatchKNNHead([D], K, max_patches=50), range(3)) for _ in range(2))
    assert len(first.bank) == 50 and torch.equal(first.bank, second.bank)


def test_offsets_maximise_the_dice_of_the_support_with_all_images_alike():
    """A large image whose scores are higher throughout has one voice, like each of the small ones."""
    generator = torch.Generator().manual_seed(0)
    image = torch.arange(4).repeat_interleave(torch.tensor([400, 60, 60, 60]))
    truth = torch.randint(0, 2, (580,), generator=generator)
    noise = 0.3 * torch.randn(580, generator=generator)
    scores = torch.stack([torch.zeros(580), 3.0 + truth + 2.0 * (image == 0) + noise])
    offset = best_offsets(scores, F.one_hot(truth, 2).T.float(), image)

    weights = torch.tensor([1 / 400, 1 / 60, 1 / 60, 1 / 60])[image]

    def taken(shift):
        return (scores[1] + shift > scores[0]).float() @ weights

    def dice(shift):
        both = ((scores[1] + shift > scores[0]) & (truth == 1)).float() @ weights
        return (2 * both / (taken(shift) + truth.float() @ weights)).item()

    assert offset[0] == 0
    ordered = scores[1].sort().values
    between = (ordered[1:] + ordered[:-1]) / 2  # one threshold in each gap: all that differ
    assert dice(offset[1]) == pytest.approx(max(dice(-threshold) for threshold in between), abs=1e-6)
    pooled = best_offsets(scores, F.one_hot(truth, 2).T.float(), torch.zeros(580))
    assert dice(offset[1]) > dice(pooled[1]) + 0.05


def test_a_class_that_is_not_told_from_the_rest_does_not_cover_the_images():
    """By Dice alone all would be taken. All images but the one that gets most too much get no more than they have."""
    generator = torch.Generator().manual_seed(0)
    image = torch.arange(4000) // 1000
    truth = (torch.rand(4000, generator=generator) < 0.1).long()
    scores = torch.stack([torch.zeros(4000), torch.randn(4000, generator=generator) + 1.0 * (image == 2)])
    offset = best_offsets(scores, F.one_hot(truth, 2).T.float(), image)
    order, allowed = scores[1].argsort(descending=True), []
    for num in range(1, 4001):
        gets = [(image[order[:num]] == one).sum() - truth[image == one].sum() for one in range(4)]
        if sum(gets) - max(gets) <= 0:
            allowed.append(num)
    assert 100 < len(allowed) < 1500
    best = max(allowed, key=lambda num: truth[order[:num]].sum() / (num + truth.sum()))
    found = scores[1] + offset[1] > 0
    assert found.sum() == best and found[image == 2].sum() > truth[image == 2].sum()
    alone = best_offsets(scores, F.one_hot(truth, 2).T.float(), torch.zeros(4000))
    assert (scores[1] + alone[1] > 0).sum() > 3500


def test_offsets_part_only_what_differs():
    """Votes are alike for many patches: a threshold takes all of them or none."""
    scores = torch.stack([torch.zeros(6), torch.tensor([3.0, 1.0, 1.0, 1.0, -1.0, -1.0])])
    truth = torch.tensor([1, 1, 0, 1, 0, 0])
    found = scores[1] + best_offsets(scores, F.one_hot(truth, 2).T.float(), torch.zeros(6))[1] > scores[0]
    assert found.tolist() == [True, True, True, True, False, False]


def faint(seed, rare):
    """A few patches of class 1 hardly told from class 0: most of their neighbours are of class 0."""
    generator = torch.Generator().manual_seed(seed)
    patches = (torch.rand(1, 20, 20, generator=generator) < rare).long()
    map = torch.randn(1, D, 20, 20, generator=generator) + 1.6 * patches[:, None] * torch.eye(D)[0][:, None, None]
    mask = patches.repeat_interleave(14, 1).repeat_interleave(14, 2)
    return Features((map,), (map.mean(dim=(2, 3)),), (280, 280)), {"mask": mask}, patches


def test_a_rare_class_is_found_however_large_the_bank():
    def dice(num, calibrate):
        head = PatchKNNHead([D], 2, calibrate=calibrate)
        for seed in range(num):
            features, batch, _ = faint(seed, 0.3 if seed == 0 else 0.05)  # the first is chosen for what it shows
            head.observe(features, batch)
        head.conclude()
        scores = []
        for seed in range(50, 55):
            features, _, patches = faint(seed, 0.05)
            found = head(features).argmax(dim=1)
            scores.append(2 * (found & patches).sum() / (found.sum() + patches.sum()))
        return float(torch.stack(scores).mean())

    assert dice(20, calibrate=False) < 0.7 * dice(1, calibrate=False)  # by majority: more images find less
    assert dice(20, calibrate=True) > 1.3 * dice(1, calibrate=True) > 0.2


def test_a_bank_of_one_image_is_calibrated_by_its_other_patches():
    features, batch, patches = scene(0)
    head = PatchKNNHead([D], K, k=1)
    head.observe(features, batch)
    head.conclude()
    assert (head(features).argmax(dim=1) == patches).float().mean() > 0.95 and torch.isfinite(head.offsets).all()


@pytest.mark.parametrize("name", HEADS)
def test_a_class_of_one_image_is_calibrated_by_that_image(name):
    """Without it nothing would show the class where the others predict it, and the offset would make it of all."""
    head = HEADS[name]()
    for seed in range(4):
        features, batch, _ = scene(seed)
        if seed:
            batch["mask"][batch["mask"] == 2] = 0
        head.observe(features, batch)
    head.conclude()
    features, _, patches = scene(50)
    found = head(features).argmax(dim=1)
    assert (found == 2).sum() <= 3 * (patches == 2).sum() and head.offsets.abs().max() < 15


def test_what_belongs_together_is_left_out_together():
    slices = [Source("a", "a_1"), Source("a", "a_2"), Source("b", "b_1"), Source("a", "a_1")]
    assert left_out_together(slices) == [0, 0, 1, 0]
    assert left_out_together([slices[0], slices[1], slices[3]]) == [0, 1, 0]  # of one volume: slice by slice


def test_windows_of_one_image_do_not_predict_each_other():
    """Every image seen twice, with twice the neighbours, is the same as once: its copy has no vote on it."""

    def offsets(names, k):
        head = PatchKNNHead([D], 2, k=k)
        for name in names:
            features, batch, _ = faint(ord(name), 0.1)
            head.observe(features, {**batch, "image_id": [name], "case_id": [name]})
        head.conclude()
        return head.offsets

    torch.testing.assert_close(offsets("aabb", 10), offsets("ab", 5))


def test_shares_leave_ignored_pixels_out():
    features, batch, _ = scene(0)
    mask = torch.zeros_like(batch["mask"])
    mask[:, :14, :7], mask[:, :14, 7:14], mask[:, :14, 14:28] = 1, 255, 255
    shares, labelled = patch_shares(mask, K, features)
    assert shares[0, :, 0, 0].tolist() == [0, 1, 0] and labelled[0, 0, 0] == 0.5 and labelled[0, 0, 1] == 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PrototypeHead([D], K, purity=0), "purity"),
        (lambda: PatchKNNHead([D], K, k=0), "head.k"),
        (lambda: PatchKNNHead([D], K, index="tree"), "faiss"),
        (lambda: PrototypeHead([D], K).conclude(), "support"),
        (lambda: PatchKNNHead([D], K).conclude(), "support"),
        (lambda: PrototypeHead([D], K).observe(scene(0)[0], {}), "multilabel"),
    ],
)
def test_what_makes_no_sense_is_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_a_class_that_no_support_shows_is_named():
    head = PrototypeHead([D], K)
    features, batch, _ = scene(0)
    batch["mask"][batch["mask"] == 2] = 0
    head.observe(features, batch)
    with pytest.raises(UserError, match="class 2"):
        head.conclude()
