"""Small networks that predict features from tokens, in self-supervised training and distillation."""

import torch
from torch import Tensor, nn


def seeded_init(module: nn.Module, seed: int) -> None:
    """Linear layers truncated normal with deviation 0.02, biases 0, from `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
                layer.bias.zero_()


class FeaturePredictor(nn.Module):
    """Patch tokens (B, N, D) and cls tokens (B, D) -> descriptions of patches and of images."""

    def __init__(self, width: int, patch_dim: int, image_dim: int, seed: int = 0) -> None:
        super().__init__()
        self.patch = _mlp(width, patch_dim)
        self.image = _mlp(width, image_dim)
        seeded_init(self, seed)

    def forward(self, patch_tokens: Tensor, cls_token: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        return self.patch(patch_tokens), self.image(cls_token)


class FeatureProjector(nn.Module):
    """A student's patch tokens (..., D) and cls tokens (..., D) -> its teacher's, each through one linear layer.

    Linear, so that what the teacher's tokens say stands in the student's own, where linear heads will look for it.
    """

    def __init__(self, width: int, teacher_width: int, seed: int = 0) -> None:
        super().__init__()
        self.patch = nn.Linear(width, teacher_width)
        self.image = nn.Linear(width, teacher_width)
        seeded_init(self, seed)

    def forward(self, patch_tokens: Tensor, cls_token: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        return self.patch(patch_tokens), self.image(cls_token)


def _mlp(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-6), nn.Linear(width, out))
