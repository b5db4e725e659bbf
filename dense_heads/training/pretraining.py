"""Self-supervised pre-training: DINO + iBOT + KoLeo as in DINOv2, and masked feature prediction."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense_heads.backbones.packed import packed_forward
from dense_heads.backbones.vit import VisionTransformer
from dense_heads.data.block_masks import batch_masks
from dense_heads.errors import UserError, unknown_name
from dense_heads.heads.dino import DINOHead
from dense_heads.heads.features import FeaturePredictor
from dense_heads.losses.self_supervised import (
    SoftmaxCenter,
    dino_loss,
    ibot_loss,
    koleo_loss,
    relational_loss,
    sinkhorn_knopp,
    teacher_entropy,
)
from dense_heads.metrics.neighbours import NeighbourProbe
from dense_heads.ops.across import mean_count, total
from dense_heads.ops.descriptors import IMAGE_DIM, PATCH_DIM, describe, moments, standardised
from dense_heads.structures import Batch
from dense_heads.training.backbone import BackboneTraining, Collapse, Recipe
from dense_heads.training.ssl_optim import WarmupSchedule

CENTERINGS = ("softmax", "sinkhorn_knopp")


@dataclass(frozen=True)
class Objective:
    """The weights of the losses and what they are made with; a loss of weight 0 costs nothing."""

    dino: float = 1.0
    ibot: float = 1.0
    koleo: float = 0.1
    features: float = 0.0  # masked feature prediction
    relations: float = 0.0  # beside it: images that look alike have cls tokens that do
    koleo_gather: bool = False  # neighbours over all processes; the original stays within each
    centering: str = "softmax"
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    teacher_warmup: float = 0.3  # share of the run
    mask_probability: float = 0.5
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    visible: float = 0.25  # weight of the patches that are not hidden, in feature prediction
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)  # dino, ibot: arguments of DINOHead

    def __post_init__(self) -> None:
        if self.centering not in CENTERINGS:
            raise unknown_name("centering", str(self.centering), CENTERINGS)
        if self.relations > 0 and self.features == 0:
            raise UserError("task.objective.relations needs task.objective.features above 0: it uses its descriptions.")
        weights = (self.dino, self.ibot, self.koleo, self.features, self.relations)
        if min(weights) < 0 or self.dino + self.ibot + self.features <= 0:
            raise UserError("The weights of the losses must be 0 or more, and one of dino, ibot, features above 0.")

    @property
    def needs_teacher(self) -> bool:
        """Whether the running mean of the student teaches."""
        return self.dino > 0 or self.ibot > 0


class PretrainingModule(BackboneTraining):
    """Student and its running mean as teacher, on global crops (the student's masked) and local crops."""

    hides = True  # masked patches are hidden from the student
    teaching: tuple[str, ...] = ("dino_head", "ibot_head")  # of the student, what its running mean teaches with

    def __init__(
        self,
        students: Mapping[str, VisionTransformer],
        objective: Objective,
        optimizer: Callable[..., torch.optim.Optimizer],
        recipe: Recipe,
        collapse: Collapse,
        probe: NeighbourProbe | None,
        seed: int,
    ) -> None:
        """What is trained.

        Args:
            students: by the ending of their parts' names, empty for a single one.
            objective: its `heads` without `ibot`: the iBOT term goes through the DINO head.
            optimizer: parameter groups -> optimiser.
            recipe: rates and schedules.
            collapse: when the run is stopped.
            probe: measures k-NN accuracy at each validation; None: nothing is measured.
            seed: of heads, masks and all that is drawn.
        """
        student: dict[str, nn.Module] = {}
        for ending, backbone in students.items():
            student |= self._parts_of(ending, backbone, objective, seed)
        averaged = [name for name in student if name.startswith(("backbone", *self.teaching))]
        super().__init__(student, averaged, optimizer, recipe, collapse, probe, seed)
        self.objective, self.endings = objective, list(students)
        self.patch_size = next(iter(students.values())).patch_size
        self.temperature = WarmupSchedule(
            *objective.teacher_temperature, int(objective.teacher_warmup * recipe.max_steps)
        )
        self.centers = nn.ModuleDict(
            {
                name: SoftmaxCenter(head["num_prototypes"])
                for name, head in objective.heads.items()
                if objective.centering == "softmax"
            }
        )

    @staticmethod
    def _parts_of(ending: str, backbone: VisionTransformer, objective: Objective, seed: int) -> dict[str, nn.Module]:
        """A student's backbone and heads."""
        parts: dict[str, nn.Module] = {f"backbone{ending}": backbone}
        width = backbone.embed_dim
        for place, name in enumerate(("dino", "ibot")):
            used = getattr(objective, name) > 0 or (
                name == "dino" and objective.ibot > 0 and "ibot" not in objective.heads
            )
            if used and name in objective.heads:
                parts[f"{name}_head{ending}"] = DINOHead(width, seed=seed + 1 + place, **objective.heads[name])
        if objective.features > 0:
            parts[f"feature_head{ending}"] = FeaturePredictor(width, PATCH_DIM, IMAGE_DIM, seed=seed + 3)
        return parts

    def masks(self, num_images: int, grid: tuple[int, int]) -> Tensor:
        """(2B, N) of this process's global crops: its part of what (seed, step) gives the whole batch."""
        everywhere = batch_masks(
            num_images * self.trainer.world_size,
            grid,
            self.seed,
            self.global_step,
            self.objective.mask_probability,
            self.objective.mask_ratio,
        )
        views = torch.from_numpy(everywhere).view(2, self.trainer.world_size, num_images // 2, -1)
        return views[:, self.global_rank].flatten(0, 1).to(self.device)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted parts on `crops`, and on `patch_masks` where the batch brings its own."""
        crops = batch["crops"]
        height, width = (side // self.patch_size for side in crops[0].shape[2:])
        masks = batch["patch_masks"] if "patch_masks" in batch else self.masks(len(crops[0]), (height, width))
        taught = self._teach(crops[0], masks) if self.objective.needs_teacher else None
        parts: dict[str, Tensor] = {}
        for ending in self.endings:
            for name, value in self._losses_of(ending, crops, masks, taught).items():
                parts[f"{name}{ending}"] = value
        return parts

    def _losses_of(
        self, ending: str, crops: list[Tensor], masks: Tensor, taught: tuple[Tensor, Tensor] | None
    ) -> dict[str, Tensor]:
        backbone = self.student[f"backbone{ending}"]
        assert isinstance(backbone, VisionTransformer)
        uses_locals = len(crops) > 1 and self.objective.dino > 0
        inputs = crops if uses_locals else crops[:1]
        # Where nothing is hidden the mask token takes part all the same: DDP waits for every parameter.
        hidden = masks if self.hides else torch.zeros_like(masks)
        outputs = packed_forward(backbone, inputs, [hidden, *[None] * (len(inputs) - 1)])
        parts: dict[str, Tensor] = {}
        if taught is not None:
            parts |= self._taught(ending, len(crops[0]), masks, outputs, taught)
        if self.objective.koleo > 0:
            halves = outputs[0]["cls_token"].chunk(2)
            spread = torch.stack([koleo_loss(half, self.objective.koleo_gather) for half in halves]).sum()
            parts["koleo"] = self.objective.koleo * spread
        if self.objective.features > 0:
            parts |= self._described(ending, crops[0], masks, outputs[0])
        return parts

    def _taught(
        self,
        ending: str,
        num_wholes: int,
        masks: Tensor,
        outputs: list[dict[str, Tensor]],
        taught: tuple[Tensor, Tensor],
    ) -> dict[str, Tensor]:
        teacher_cls, teacher_patches = taught
        parts: dict[str, Tensor] = {}
        if self.objective.dino > 0:
            logits = self.student[f"dino_head{ending}"](torch.cat([output["cls_token"] for output in outputs]))
            wholes, locals_ = logits.split([num_wholes, len(logits) - num_wholes])
            first, second = teacher_cls.chunk(2)
            terms = 2 + 2 * (len(locals_) // len(first))
            loss = 2 * dino_loss(wholes, torch.cat((second, first)))
            for student in locals_.split(len(first)) if len(locals_) else ():
                loss = loss + dino_loss(student, first) + dino_loss(student, second)
            parts["dino"] = self.objective.dino * loss / terms
        if self.objective.ibot > 0:
            head = self.student[f"{self._of_patches}_head{ending}"]
            student_patches = head(outputs[0]["patch_tokens"][masks])
            parts["ibot"] = self.objective.ibot * ibot_loss(student_patches, teacher_patches, masks)
        return parts

    @torch.no_grad()
    def _teach(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's probabilities for the cls tokens of the global crops, and for their masked patches."""
        tokens = self.teacher_tokens(images)
        temperature = self.temperature(self.global_step)
        cls, patches = images.new_zeros(0), images.new_zeros(0)
        if self.objective.dino > 0:
            cls = self._probabilities("dino", self.teacher_head("dino")(tokens["cls_token"]), temperature)
            self._judge(cls, temperature)
        if self.objective.ibot > 0:
            name = self._of_patches
            patches = self._probabilities(name, self.teacher_head(name)(tokens["patch_tokens"][masks]), temperature)
            self.log("teacher/patch_entropy", teacher_entropy(patches) if len(patches) else torch.zeros(()))
        return cls, patches

    def teacher_tokens(self, images: Tensor) -> dict[str, Tensor]:
        """`cls_token` and `patch_tokens` of the global crops, as the teacher sees them; no gradient."""
        tokens: dict[str, Tensor] = self.ema["backbone"](images)
        return tokens

    def teacher_head(self, name: str) -> nn.Module:
        """The teacher's head of `dino` or `ibot`."""
        return self.ema[f"{name}_head"]

    def kept_heads(self) -> dict[str, Tensor]:
        """The teacher's heads: a student of it needs them."""
        return {name: value for name, value in self.ema.state_dict().items() if "_head." in name}

    @property
    def _of_patches(self) -> str:
        """The head that the iBOT term goes through."""
        return "ibot" if "ibot" in self.objective.heads else "dino"

    def _judge(self, probabilities: Tensor, temperature: float) -> None:
        """Log what the teacher's assignments say, over all processes, and stop when it is nothing."""
        own = torch.stack(
            (teacher_entropy(probabilities) * len(probabilities), probabilities.new_tensor(len(probabilities)))
        )
        sums = total(torch.cat((probabilities.sum(0), own)))
        entropy = float(sums[-2] / sums[-1])
        information = float(teacher_entropy(sums[:-2].unsqueeze(0) / sums[-1])) - entropy
        self.log_dict({"teacher/entropy": entropy, "teacher/information": information, "teacher/temp": temperature})
        self.judge(information=information)

    def _probabilities(self, name: str, logits: Tensor, temperature: float) -> Tensor:
        if self.objective.centering == "sinkhorn_knopp":
            return sinkhorn_knopp(logits, temperature)
        center = self.centers[name]
        assert isinstance(center, SoftmaxCenter)
        probabilities: Tensor = center(logits, temperature)
        center.update(logits)
        return probabilities

    def _described(self, ending: str, images: Tensor, masks: Tensor, output: dict[str, Tensor]) -> dict[str, Tensor]:
        """Masked feature prediction: patches mostly where they were hidden, the whole image from the cls token."""
        with torch.autocast(images.device.type, enabled=False):
            patches, whole = describe(images)
            patches, whole = (standardised(x, total(moments(x))) for x in (patches, whole))
        predictor = self.student[f"feature_head{ending}"]
        assert isinstance(predictor, FeaturePredictor)
        from_patches, from_cls = predictor(output["patch_tokens"], output["cls_token"])
        errors = F.smooth_l1_loss(from_patches.float(), patches, reduction="none").mean(-1)
        # Means over the patches of all processes, so that these need not hide equally many.
        weights = torch.where(masks, 1.0 / mean_count(masks), self.objective.visible / mean_count(~masks))
        predicted = (errors * weights).sum() + F.smooth_l1_loss(from_cls.float(), whole)
        parts = {"features": self.objective.features * predicted}
        if self.objective.relations > 0:
            parts["relations"] = self.objective.relations * relational_loss(output["cls_token"], whole)
        return parts
