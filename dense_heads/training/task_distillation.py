"""Task distillation: a trained model (backbone and head) teaches a student what it says of each training image."""

import copy
import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dense_heads.errors import UserError
from dense_heads.heads.features import FeatureProjector
from dense_heads.losses.distillation import feature_loss, soft_divergence
from dense_heads.losses.weights import checked_weights, is_number
from dense_heads.models.dense import DenseModel, leave_out_of_state_dicts
from dense_heads.ops.across import mean_count
from dense_heads.ops.pad import Placement
from dense_heads.ops.seeding import stable_seed
from dense_heads.structures import Batch, Features
from dense_heads.training.base import Candidate, DenseModule, Learner
from dense_heads.training.depth import DepthModule
from dense_heads.training.segmentation import SegmentationModule


@dataclass(frozen=True)
class Lessons:
    """What counts in a student's loss, and for how much.

    Args:
        teacher: what the teacher predicts: divergence of class probabilities (segmentation), the task's own depth loss.
        labels: the task's loss, where an image has labels.
        features: the teacher's tokens of the deepest block that its head sees, predicted from the student's.
        temperature: that softens class probabilities.

    Raises:
        UserError: a weight below 0, nothing that the teacher teaches, or a temperature that is not above 0.
    """

    teacher: float = 1.0
    labels: float = 1.0
    features: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("teacher", "labels", "features")}
        checked_weights(weights, "task.distill")
        if self.teacher + self.features == 0:
            raise UserError("task.distill: teacher and features are 0, so the teacher teaches nothing. Raise one.")
        if not (is_number(self.temperature) and self.temperature > 0):
            raise UserError(f"task.distill.temperature={self.temperature!r}: expected a number above 0.")


class Lesson(NamedTuple):
    """What the teacher says of a batch."""

    map: Tensor  # (B, K, h, w) of its head, float32
    placement: Placement
    features: Features  # that its head saw
    pixels: Tensor  # (B, H, W) bool: of the image, not of the padding to one size


class Teacher(nn.Module):
    """A trained model that stays as it is: no gradient, eval mode, nothing in a state dict."""

    def __init__(self, model: DenseModel, run: str) -> None:
        """`run`: where it comes from, for reports."""
        super().__init__()
        self.backbone, self.head = model.backbone, model.head
        self.head.requires_grad_(False)
        self.card, self.run = model.card, run
        leave_out_of_state_dicts(self)
        self.train(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def fingerprint(self) -> str:
        """Of backbone and head."""
        digest = hashlib.sha256(self.backbone.fingerprint().encode())
        for key, tensor in sorted(self.head.state_dict().items()):
            digest.update(
                key.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Lesson:
        """(B, C, H, W) normalised."""
        request = self.backbone.request(self.head)
        levels = self.backbone(images, [request]).float()
        features = levels.features(request)
        # The padding of a training image is exactly 0; no normalised pixel of 8 bits is.
        pixels = (images != 0).any(dim=1)
        return Lesson(self.head(features).float(), self.backbone.placement(levels), features, pixels)


class Taught(DenseModule):
    """Mixed into a family's module: its loss on labels, and beside it what the teacher says of the same images.

    Images without labels carry labels that count nowhere. A family says in `imitation` how an output is compared.
    """

    def __init__(self, *args: Any, teacher: Teacher, lessons: Lessons, **kwargs: Any) -> None:
        """`lessons`: the terms of the loss."""
        super().__init__(*args, **kwargs)
        self.teacher, self.lessons = teacher, lessons
        self.projector: FeatureProjector | None = None
        if lessons.features > 0:
            if not self.backbone.learns:
                raise UserError(
                    f"task.distill.features={lessons.features} with a frozen student: its features cannot come nearer "
                    "to the teacher's. Set backbone.trainable=true, or task.distill.features=0."
                )
            if self.backbone.backbone.patch_size != teacher.backbone.backbone.patch_size:
                raise UserError("task.distill.features: student and teacher have patches of different sizes.")
            own, theirs = self.candidates[0].head.in_channels[-1], teacher.head.in_channels[-1]
            self.projector = FeatureProjector(own, theirs, seed=stable_seed("projector", self.seed))
        self._lesson: Lesson | None = None

    def imitation(self, candidate: Candidate, output: Tensor, placement: Placement, lesson: Lesson) -> Tensor:
        """How far a candidate's output is from the teacher's, a scalar."""
        raise NotImplementedError

    def losses(self, batch: Batch) -> list[Tensor]:
        """As without a teacher, whom all candidates hear on one pass."""
        images = batch["image"]
        assert isinstance(images, Tensor)
        self._lesson = self.teacher(images)
        return super().losses(batch)

    def candidate_loss(self, candidate: Candidate, features: Features, batch: Batch) -> Tensor:
        """The weighted sum of labels, teacher and features; each part is logged where there is one candidate."""
        lesson, weights = self._lesson, self.lessons
        assert lesson is not None
        output = candidate.head(features)
        parts = {}
        if weights.labels > 0:
            parts["labels"] = weights.labels * self.loss(candidate, output, features, batch)
        if weights.teacher > 0:
            placement = self.backbone.placement(features)
            parts["teacher"] = weights.teacher * self.imitation(candidate, output, placement, lesson)
        if self.projector is not None:
            parts["features"] = weights.features * self._feature_term(self.projector, features, lesson.features)
        if len(self.candidates) == 1:
            self.log_dict({f"train/{name}": value.detach() for name, value in parts.items()}, sync_dist=True)
        return torch.stack(list(parts.values())).sum()

    def _feature_term(self, projector: FeatureProjector, features: Features, aim: Features) -> Tensor:
        """Of patch and cls tokens, as in `task=distillation`."""
        found = projector(features.patch_maps[-1].flatten(2).transpose(1, 2), features.cls_tokens[-1])
        targets = aim.patch_maps[-1].flatten(2).transpose(1, 2), aim.cls_tokens[-1]
        return torch.stack([feature_loss(*pair) for pair in zip(found, targets, strict=True)]).sum()

    def learners(self) -> list[Learner]:
        """The projector learns as the backbone does."""
        found = super().learners()
        if self.projector is not None:
            found.append(found[-1]._replace(parameters=list(self.projector.parameters())))
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Which teacher taught."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["teacher_fingerprint"] = self.teacher.fingerprint()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another teacher."""
        theirs, ours = checkpoint["teacher_fingerprint"], self.teacher.fingerprint()
        if theirs != ours:
            raise UserError(
                f"The checkpoint was taught by a model with fingerprint {theirs}, distill={self.teacher.run} has "
                f"{ours}. Use the same teacher."
            )
        super().on_load_checkpoint(checkpoint)


class TaughtSegmentation(Taught, SegmentationModule):
    """The teacher's class probabilities, softened, at label resolution; padding aside."""

    def imitation(self, candidate: Candidate, output: Tensor, placement: Placement, lesson: Lesson) -> Tensor:
        """Mean divergence over pixels; image by image, so that one image's full-size logits are there at a time."""
        summed = output.new_zeros(())
        for index, pixels in enumerate(lesson.pixels):
            maps = output[index : index + 1], lesson.map[index : index + 1]
            summed = summed + checkpoint(
                self._divergence, *maps, placement, lesson.placement, pixels[None], use_reentrant=False
            )
        return summed / mean_count(lesson.pixels)

    def _divergence(self, map: Tensor, aim: Tensor, placement: Placement, theirs: Placement, pixels: Tensor) -> Tensor:
        logits = placement.enlarge(map.float())
        return (soft_divergence(logits, theirs.enlarge(aim), self.lessons.temperature) * pixels).sum()


class TaughtDepth(Taught, DepthModule):
    """The teacher's metres as labels of every pixel of the image, by the task's own loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """As Taught. The loss on the teacher's metres counts its warmup by itself."""
        super().__init__(*args, **kwargs)
        self.imitations = nn.ModuleList(copy.deepcopy(candidate.loss) for candidate in self.candidates)

    def imitation(self, candidate: Candidate, output: Tensor, placement: Placement, lesson: Lesson) -> Tensor:
        """The depth loss to the teacher's metres."""
        (place,) = (index for index, one in enumerate(self.candidates) if one is candidate)
        aim = torch.where(lesson.pixels, lesson.placement.enlarge(lesson.map)[:, 0], 0.0)
        loss: Tensor = self.imitations[place](placement.enlarge(output.float())[:, 0], aim)
        return loss
