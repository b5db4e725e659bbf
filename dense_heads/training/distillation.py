"""Distillation of a frozen teacher into one or several students, on one pass of the teacher (facts sheet 4.3)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dense_heads.backbones.vit import VisionTransformer
from dense_heads.backbones.zoo import resolve_blocks
from dense_heads.errors import UserError
from dense_heads.heads.features import FeatureProjector
from dense_heads.losses.distillation import feature_loss, similarity
from dense_heads.metrics.neighbours import NeighbourProbe
from dense_heads.models.dense import FrozenBackbone, leave_out_of_state_dicts
from dense_heads.ops.seeding import stable_seed
from dense_heads.structures import Batch
from dense_heads.training.backbone import BackboneTraining, Collapse, Recipe
from dense_heads.training.pretraining import Objective, PretrainingModule


@dataclass(frozen=True)
class FeatureObjective:
    """What of the teacher's features a student must find, and how the distance is taken."""

    blocks: str = "last"  # of teacher and student, by a name that `backbones/zoo.py` resolves for each
    patch: float = 1.0
    cls: float = 1.0
    cosine: float = 1.0
    smooth_l1: float = 1.0

    def __post_init__(self) -> None:
        weights = (self.patch, self.cls, self.cosine, self.smooth_l1)
        if min(weights) < 0 or self.patch + self.cls <= 0 or self.cosine + self.smooth_l1 <= 0:
            raise UserError(
                f"task.features: patch={self.patch}, cls={self.cls}, cosine={self.cosine}, smooth_l1={self.smooth_l1}; "
                "expected weights of 0 or more, one of the first two and one of the last two above 0."
            )


class _Taught:
    """What both kinds of distillation have: a teacher that no checkpoint holds, known by its fingerprint."""

    teacher: FrozenBackbone

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Which teacher taught."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        checkpoint["teacher_fingerprint"] = self.teacher.fingerprint()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another teacher."""
        theirs, ours = checkpoint["teacher_fingerprint"], self.teacher.fingerprint()
        if theirs != ours:
            raise UserError(
                f"The checkpoint was taught by a teacher with fingerprint {theirs}, this one has {ours}. "
                "Use the same teacher and teacher.weights."
            )
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]


class FeatureDistillation(_Taught, BackboneTraining):
    """Students predict the teacher's patch and cls tokens from their own, through a linear layer that is thrown away.

    For teachers without heads: all official ones. `ema` holds each student's running mean, the result.
    """

    def __init__(
        self,
        students: Mapping[str, VisionTransformer],
        teacher: FrozenBackbone,
        objective: FeatureObjective,
        optimizer: Callable[..., torch.optim.Optimizer],
        recipe: Recipe,
        collapse: Collapse,
        probe: NeighbourProbe | None,
        seed: int,
    ) -> None:
        """`students`: by the ending of their parts' names, empty for a single one."""
        request = teacher.requested(objective.blocks, norm=True)
        width = teacher.backbone.embed_dim
        student: dict[str, nn.Module] = {}
        for ending, backbone in students.items():
            student[f"backbone{ending}"] = backbone
            student[f"projector{ending}"] = nn.ModuleList(
                FeatureProjector(backbone.embed_dim, width, seed=stable_seed("projector", seed, place))
                for place in range(len(request.blocks))
            )
        averaged = [f"backbone{ending}" for ending in students]
        super().__init__(student, averaged, optimizer, recipe, collapse, probe, seed)
        self.teacher, self.request = teacher, request
        self.objective, self.endings = objective, list(students)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`patch` and `cls` of each student, on the global crops."""
        images = batch["crops"][0]
        targets = self._targets(batch)
        parts: dict[str, Tensor] = {}
        for ending in self.endings:
            for name, value in self._losses_of(ending, images, targets).items():
                parts[f"{name}{ending}"] = value
        return parts

    def _losses_of(self, ending: str, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        backbone, projectors = self.student[f"backbone{ending}"], self.student[f"projector{ending}"]
        assert isinstance(backbone, VisionTransformer) and isinstance(projectors, nn.ModuleList)
        blocks = resolve_blocks(backbone.name, self.objective.blocks)
        grid = images.shape[-2] // backbone.patch_size * (images.shape[-1] // backbone.patch_size)
        unmasked = torch.zeros(
            len(images), grid, dtype=torch.bool, device=images.device
        )  # DDP: every parameter is used
        outputs = backbone.block_outputs(images, blocks, unmasked)
        sums = {"patch": images.new_zeros(()), "cls": images.new_zeros(())}
        for block, projector, target in zip(blocks, projectors, targets, strict=True):
            tokens = backbone.norm(outputs[block])
            found = dict(
                zip(("patch", "cls"), projector(tokens[:, 1 + backbone.num_registers :], tokens[:, 0]), strict=True)
            )
            for name in sums:
                distance = feature_loss(found[name], target[name], self.objective.cosine, self.objective.smooth_l1)
                sums[name] = sums[name] + getattr(self.objective, name) * distance / len(blocks)
        for name in sums:  # of the deepest block
            self.log(f"teacher/{name}_cosine{ending}", similarity(found[name].detach(), target[name]), sync_dist=True)
        return sums

    def _targets(self, batch: Batch) -> list[dict[str, Tensor]]:
        """The teacher's tokens of each block: `patch` (B, N, D) and `cls` (B, D), float32; from the cache or a pass."""
        if "features" in batch:
            levels = batch["features"]
        else:
            with torch.inference_mode():
                levels = self.teacher(batch["crops"][0], [self.request])
        # Copies made outside are ordinary tensors, which the losses may keep for their gradients.
        features = levels.map(lambda tensor: tensor.to(torch.float32, copy=True)).features(self.request)
        return [
            {"patch": map.flatten(2).transpose(1, 2), "cls": token}
            for map, token in zip(features.patch_maps, features.cls_tokens, strict=True)
        ]


class HeadDistillation(_Taught, PretrainingModule):
    """DINOv2's objective with a frozen teacher and its trained heads in place of the student's running mean.

    Nothing is masked from the students; the iBOT term is on the global crops' patches; what is kept is each student's
    running mean (facts sheet 4.3).
    """

    hides = False
    teaching = ()

    def __init__(
        self,
        students: Mapping[str, VisionTransformer],
        teacher: FrozenBackbone,
        teacher_heads: Mapping[str, nn.Module],
        objective: Objective,
        *args: Any,
    ) -> None:
        """`teacher_heads`: `dino` and, where it has one, `ibot`; of the shapes in `objective.heads`."""
        super().__init__(students, objective, *args)
        self.teacher = teacher
        self.teacher_heads = nn.ModuleDict(teacher_heads).requires_grad_(False).eval()
        leave_out_of_state_dicts(self.teacher_heads)
        self.last = teacher.requested("last", norm=True)

    def masks(self, num_images: int, grid: tuple[int, int]) -> Tensor:
        """The patches that are compared: all (DINOv2), or with `mask_probability` below 1 drawn ones (DINOv3)."""
        if self.objective.mask_probability < 1:
            return super().masks(num_images, grid)
        return torch.ones(num_images, grid[0] * grid[1], dtype=torch.bool, device=self.device)

    def teacher_tokens(self, images: Tensor) -> dict[str, Tensor]:
        """Of the frozen teacher."""
        with torch.inference_mode():
            levels = self.teacher(images, [self.last])
        features = levels.map(lambda tensor: tensor.to(torch.float32, copy=True)).features(self.last)
        return {
            "cls_token": features.cls_tokens[0],
            "patch_tokens": features.patch_maps[0].flatten(2).transpose(1, 2),
        }

    def teacher_head(self, name: str) -> nn.Module:
        """`dino` or `ibot`."""
        return self.teacher_heads[name]
