"""Plain DETR: a set of objects from a transformer over the frozen features, without anchors and without NMS.

Lin et al., ICCV 2023; the detector that DINOv3 is evaluated with (facts sheet 7.5).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

from dense_heads.errors import UserError
from dense_heads.heads.detection import PATCH_SIZE, DetectionHead, Frame, finished, targets
from dense_heads.heads.detr_layers import (
    DecoderLayer,
    EncoderLayer,
    Perceptron,
    corrected,
    sine_of_boxes,
    sine_of_cells,
    usable,
)
from dense_heads.heads.pyramid import SimplePyramid
from dense_heads.structures import Batch, Detection, Features, Size

Said = dict[str, Tensor]  # of Q queries: logits (B, Q, K), boxes, deltas, start (B, Q, 4) in shares of the grid
_PRIOR = -math.log((1 - 0.01) / 0.01)  # the bias from which every class starts at a probability of 0.01
_SMALLEST = 50.0  # pixels: the side of proposals at stride 7; twice as large at each coarser one


class PlainDETR(DetectionHead):
    """Proposals at every place become queries, which a decoder corrects layer by layer.

    Two stages: each cell of a pyramid over the encoded map proposes a box; the best ones are where the decoder's
    queries start, their content is learnt (mixed selection). Each layer corrects the boxes of the one before, and the
    loss looks at every layer (auxiliary losses); a layer's correction is also learnt from the next one's error (look
    forward twice). In training a second group of queries may be matched with each object several times.

    Args:
        in_channels: width of each chosen block's map.
        num_outputs: classes.
        blocks, norm: see Head.
        windows: so many a side in which the backbone sees an image beside a global view; 1 sees it whole.
        channels: width of the transformer.
        num_heads: of its attention.
        hidden: width of its perceptrons.
        bias_hidden: width of the perceptron that turns distances into attention.
        encoder_layers, decoder_layers: how many.
        queries: objects that can be found in an image.
        extra_queries: of the second group; 0 for none.
        repeats: queries of the second group that are matched with each object.
        strides: of the pyramid that proposes.
        detections: at most so many for an image, best first.
        criterion: matching and losses, `losses/set_prediction.py`; not needed in use.
    """

    terms = ("class", "box", "giou", "proposal_class", "proposal_box", "proposal_giou")

    def __init__(
        self,
        in_channels: Sequence[int],
        num_outputs: int,
        blocks: str = "last",
        norm: bool = True,
        windows: int = 1,
        channels: int = 128,
        num_heads: int = 8,
        hidden: int = 512,
        bias_hidden: int = 64,
        encoder_layers: int = 1,
        decoder_layers: int = 3,
        queries: int = 100,
        extra_queries: int = 0,
        repeats: int = 4,
        strides: Sequence[int] = (7, 14, 28, 56),
        detections: int = 100,
        criterion: Callable[..., Mapping[str, Tensor]] | None = None,
    ) -> None:
        super().__init__(in_channels, num_outputs, blocks, norm)
        if channels % (2 * num_heads) or channels % 8 or min(queries, decoder_layers, windows) < 1:
            raise UserError(
                f"head.channels={channels}, num_heads={num_heads}, queries={queries}, decoder_layers={decoder_layers}, "
                f"windows={windows}; expected a width that is a multiple of 8 and of twice the heads, and at least one "
                "query, layer and window."
            )
        self.windows = windows
        self.queries, self.extra_queries, self.repeats, self.detections = queries, extra_queries, repeats, detections
        self.project = nn.Sequential(nn.Conv2d(sum(in_channels), channels, 1), LayerNorm2d(channels, eps=1e-6))
        self.encoder = nn.ModuleList(EncoderLayer(channels, num_heads, hidden) for _ in range(encoder_layers))
        self.encoded = nn.LayerNorm(channels)
        self.pyramid = SimplePyramid([channels], channels, strides)
        self.proposal = _Speaker(channels, num_outputs)
        self.content = nn.Embedding(queries + extra_queries, channels)
        self.place = Perceptron(2 * channels, channels, channels)
        self.decoder = nn.ModuleList(
            DecoderLayer(channels, num_heads, hidden, bias_hidden) for _ in range(decoder_layers)
        )
        self.decoded = nn.LayerNorm(channels)
        self.speakers = nn.ModuleList(_Speaker(channels, num_outputs) for _ in range(decoder_layers))
        self._criterion = (criterion,)  # in a tuple: not a module of this one, so in no state dict

    def losses(self, features: Features, batch: Batch) -> dict[str, Tensor]:
        """Of the last layer and, summed into the same terms, of the layers before it; of the proposals."""
        (criterion,) = self._criterion
        assert criterion is not None, "a PlainDETR without a criterion cannot be trained"
        found = targets(features, batch)
        height, width = Frame.of(features).size
        boxes = [one["boxes"] / one["boxes"].new_tensor([width, height] * 2) for one in found]
        labels = [one["labels"] for one in found]
        proposals, layers, extra = self._look(features, training=True)
        terms = _summed([criterion(said, boxes, labels) for said in layers])
        if extra:
            more = _summed([criterion(said, boxes, labels, repeat=self.repeats) for said in extra])
            terms = _summed([terms, more])
        first = criterion(proposals, boxes, labels)
        return {**terms, **{f"proposal_{name}": term for name, term in first.items()}}

    def detect(self, features: Features, sizes: Sequence[Size]) -> list[Detection]:
        """See DetectionHead. The best of all queries and classes: a query may speak for two classes."""
        _, layers, _ = self._look(features, training=False)
        said = layers[-1]
        height, width = Frame.of(features).size
        scores = said["logits"].sigmoid().flatten(1)
        best, places = scores.topk(min(self.detections, scores.shape[1]), dim=1)
        found = []
        for image in range(len(sizes)):
            queries = places[image] // self.num_outputs
            boxes = said["boxes"][image, queries] * said["boxes"].new_tensor([width, height] * 2)
            found.append({"boxes": boxes, "scores": best[image], "labels": places[image] % self.num_outputs})
        return finished(found, features, sizes)

    def _look(self, features: Features, training: bool) -> tuple[Said, list[Said], list[Said]]:
        """What the proposals say, what each layer of the decoder says, and the same of the extra queries."""
        x = self.project(torch.cat(features.patch_maps, dim=1))
        grid = (int(x.shape[-2]), int(x.shape[-1]))
        memory = x.flatten(2).transpose(1, 2)
        position = sine_of_cells(grid, memory.shape[2], memory)
        for layer in self.encoder:
            memory = layer(memory, position)
        memory = self.encoded(memory)
        proposals = self._propose(memory, grid)
        groups = [(0, self.queries), (self.queries, self.extra_queries)]
        said: list[list[Said]] = []
        for first, num in groups if training else groups[:1]:
            said.append(self._decode(proposals, self.content.weight[first : first + num], memory, position, grid))
        return proposals, said[0], said[1] if training else []

    def _propose(self, memory: Tensor, grid: tuple[int, int]) -> Said:
        """A class and a box from each cell of the pyramid."""
        x = memory.transpose(1, 2).reshape(len(memory), -1, *grid)
        size = (grid[0] * PATCH_SIZE, grid[1] * PATCH_SIZE)
        levels = self.pyramid(Features((x,), (), size)).values()
        cells, starts = [], []
        for level, stride in zip(levels, self.pyramid.strides, strict=True):
            rows, columns = -(-size[0] // stride), -(-size[1] // stride)  # the pyramid's last cells may be padding
            cells.append(level[..., :rows, :columns].flatten(2).transpose(1, 2))
            starts.append(_starts((rows, columns), stride, size, memory))
        start = torch.cat(starts).expand(len(memory), -1, -1)
        said: Said = self.proposal(torch.cat(cells, dim=1), start)
        return said

    def _decode(
        self, proposals: Said, content: Tensor, memory: Tensor, position: Tensor, grid: tuple[int, int]
    ) -> list[Said]:
        """What each layer says, from the best proposals on; none without queries."""
        num = min(len(content), proposals["logits"].shape[1])
        if num == 0:
            return []
        best = proposals["logits"].amax(-1).topk(num, dim=1).indices
        boxes = usable(proposals["boxes"].gather(1, best[..., None].expand(-1, -1, 4)).detach())
        before = boxes  # what the layer before said, with its gradient
        x = content[:num].expand(len(memory), -1, -1)
        layers = []
        for layer, speaker in zip(self.decoder, self.speakers, strict=True):
            place = self.place(sine_of_boxes(boxes, x.shape[2]))
            x = layer(x, place, boxes, memory, position, grid)
            said = speaker(self.decoded(x), before)
            layers.append({**said, "start": boxes})
            before, boxes = usable(said["boxes"]), usable(said["boxes"].detach())
        return layers


class _Speaker(nn.Module):
    """What a query says: classes, and a correction of the box that it starts from."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.classes = nn.Linear(channels, num_classes)
        self.deltas = Perceptron(channels, channels, channels, 4)
        nn.init.constant_(self.classes.bias, _PRIOR)
        last: Any = self.deltas[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, start: Tensor) -> Said:
        """(B, Q, C) and boxes (B, Q, 4) -> Said."""
        deltas = self.deltas(x)
        return {"logits": self.classes(x), "boxes": corrected(start, deltas), "deltas": deltas, "start": start}


def _starts(grid: tuple[int, int], stride: int, size: Size, like: Tensor) -> Tensor:
    """(rows x columns, 4): squares around the cells of one level, in shares of the image, for proposals to correct."""
    rows, columns = (torch.arange(n, device=like.device, dtype=like.dtype) + 0.5 for n in grid)
    down, across = torch.meshgrid(rows * stride, columns * stride, indexing="ij")
    centres = torch.stack([across, down], dim=-1).flatten(0, 1)
    half = _SMALLEST * stride / (PATCH_SIZE / 2) / 2
    boxes = torch.cat([centres - half, centres + half], dim=1)
    return usable(boxes / boxes.new_tensor([size[1], size[0]] * 2))


def _summed(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}
