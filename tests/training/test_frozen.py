"""A frozen backbone is frozen: proven on a real training run."""

import pytest
import torch

from dense_heads.backbones.weights import load_backbone
from dense_heads.heads.linear import LinearHead
from dense_heads.losses.segmentation import SegmentationLoss
from dense_heads.models.dense import FrozenBackbone
from dense_heads.models.inference import Inference
from dense_heads.training.base import Candidate
from dense_heads.training.optim import Schedule
from dense_heads.training.segmentation import SegmentationModule


@pytest.fixture
def module():
    backbone = FrozenBackbone(load_backbone("vitn14_reg", None, drop_path=0.3))
    head = LinearHead([192], 3)
    candidate = Candidate("only", head, SegmentationLoss(), 0.01, 1e-4, Schedule("constant", 10))
    return SegmentationModule(
        backbone,
        [candidate],
        torch.optim.AdamW,
        primary="miou",
        direction="max",
        seed=0,
        num_classes=3,
        inference=Inference(),
        class_names=["a", "b", "c"],
    )


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randn(2, 3, 42, 56, generator=generator),
        "mask": torch.randint(0, 3, (2, 42, 56), generator=generator),
    }


def train(module, steps=3):
    optimizer = module.configure_optimizers()["optimizer"]
    module.train()
    for step in range(steps):
        optimizer.zero_grad()
        sum(module.losses(batch(step))).backward()
        optimizer.step()
    return optimizer


def test_training_changes_the_head_and_nothing_else(module, monkeypatch):
    monkeypatch.setattr(type(module), "global_step", 0)
    monkeypatch.setattr(type(module), "global_rank", 0)
    frozen = module.backbone.backbone
    before = {key: value.clone() for key, value in [*frozen.named_parameters(), *frozen.named_buffers()]}
    head_before = [p.clone() for p in module.heads.parameters()]
    fingerprint = frozen.fingerprint()
    optimizer = train(module)

    after = dict([*frozen.named_parameters(), *frozen.named_buffers()])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert frozen.fingerprint() == fingerprint
    assert all(not p.requires_grad and p.grad is None for p in frozen.parameters())
    assert all(p.grad is not None for p in module.heads.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(head_before, module.heads.parameters(), strict=True))
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert in_optimizer == {id(p) for p in module.heads.parameters()}
    assert set(map(id, optimizer.state)) == in_optimizer


def test_stays_in_eval_mode_and_out_of_state_dicts(module):
    module.train()
    assert module.heads[0].training
    assert not any(part.training for part in module.backbone.modules())
    assert module.state_dict() and not any(key.startswith("backbone") for key in module.state_dict())


def test_a_state_dict_without_backbone_loads_strictly(module):
    frozen = module.backbone.backbone.fingerprint()
    state = {key: torch.full_like(value, 2) for key, value in module.state_dict().items()}
    module.load_state_dict(state, strict=True)
    assert (module.heads[0].conv_seg.weight == 2).all()
    assert module.backbone.backbone.fingerprint() == frozen
    with pytest.raises(RuntimeError, match="Missing"):
        module.load_state_dict({})


def test_features_are_those_of_the_backbone_itself():
    """One pass for several requests gives what get_intermediate_layers gives, the padding of `pad` included."""
    backbone = load_backbone("vitn14_reg", None, patch_fit="pad")
    images = torch.randn(2, 3, 30, 45)
    requests = [FrozenBackbone(backbone).request(head) for head in heads()]
    seen = FrozenBackbone(backbone)(images, requests)
    for request in requests:
        features = seen.features(request)
        expected = backbone.get_intermediate_layers(images, request.blocks, True, True, norm=request.norm)
        for (patches, cls), ours, our_cls in zip(expected, features.patch_maps, features.cls_tokens, strict=True):
            torch.testing.assert_close(ours, patches)
            torch.testing.assert_close(our_cls, cls)
        assert features.image_size == (30, 45)
        assert features.padding == (5, 6, 6, 6)


def heads():
    return [LinearHead([192], 2), LinearHead([192] * 4, 2, blocks="last4"), LinearHead([192], 2, norm=False)]


def test_pad_exact_cuts_the_padding_out_and_pad_does_not():
    torch.manual_seed(0)
    images, head = torch.randn(1, 3, 30, 45), LinearHead([192], 2).eval()
    backbone = load_backbone("vitn14_reg", None)
    pad, exact = (FrozenBackbone(backbone, fit).predict_all(images, [head])[0] for fit in ("pad", "pad_exact"))
    assert pad.shape == exact.shape == (1, 2, 30, 45)
    assert not torch.allclose(pad, exact)
