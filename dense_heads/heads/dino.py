"""The projection head of DINO and iBOT; state-dict keys as in the original (facts sheet 4.1)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS_FILE = "heads.safetensors"  # of a pre-training run: the teacher's heads, for students of it


class WeightNormLinear(nn.Module):
    """Linear without bias whose rows are `weight_g` times unit vectors along `weight_v`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_features, 1))
        self.weight_v = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """(M, in_features) -> (M, out_features)."""
        rows = self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))
        return F.linear(x, rows)


class DINOHead(nn.Module):
    """Tokens (M, D) -> scores (M, K) of prototypes: MLP, unit length, weight-normalised linear layer."""

    def __init__(
        self, in_dim: int, num_prototypes: int, hidden_dim: int = 2048, bottleneck_dim: int = 256, seed: int = 0
    ) -> None:
        """Random numbers come from `seed` alone."""
        super().__init__()
        sizes = (in_dim, hidden_dim, hidden_dim, bottleneck_dim)
        layers: list[nn.Module] = []
        for index in range(3):
            layers += [nn.Linear(sizes[index], sizes[index + 1]), nn.GELU()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.last_layer = WeightNormLinear(bottleneck_dim, num_prototypes)
        generator = torch.Generator().manual_seed(seed)
        bound = bottleneck_dim**-0.5
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name == "last_layer.weight_v":  # the original leaves it as torch makes a linear layer
                    parameter.uniform_(-bound, bound, generator=generator)
                elif name.endswith("bias"):
                    parameter.zero_()
                elif name != "last_layer.weight_g":
                    nn.init.trunc_normal_(parameter, std=0.02, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        hidden = self.mlp(tokens)
        eps = 1e-6 if hidden.dtype == torch.float16 else 1e-12
        scores: Tensor = self.last_layer(F.normalize(hidden, dim=-1, p=2.0, eps=eps))
        return scores
