"""The contract of a head."""

from collections.abc import Sequence

from torch import Tensor, nn

from dense_heads.structures import Features


class Head(nn.Module):
    """Features of a frozen backbone -> a dense prediction at the head's own resolution.

    A head never resizes to image size: `models/dense.py` does. `blocks` is one of the names that
    `backbones/zoo.py` resolves for each backbone (`last`, `last4`, `even4`, `quarters`).
    """

    windows: int = 1  # above 1: it sees each block in so many windows a side, and in the image made small (`Level`)
    auxiliary: Sequence[
        tuple[float, Tensor]
    ] = ()  # of the last forward in training: weights and maps of deep supervision

    def __init__(self, in_channels: Sequence[int], num_outputs: int, blocks: str = "last", norm: bool = True) -> None:
        """`in_channels`: width of each chosen block's map; `norm`: whether the backbone's final norm is applied."""
        super().__init__()
        self.in_channels = tuple(in_channels)
        self.num_outputs = num_outputs
        self.blocks = blocks
        self.norm = norm

    def forward(self, features: Features) -> Tensor:
        """(B, num_outputs, h', w') at whatever resolution the head works at."""
        raise NotImplementedError
