"""What pre-training and distillation share: they train a whole backbone, by steps, on unlabelled images."""

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from dense_heads.backbones.base import Backbone
from dense_heads.errors import UserError
from dense_heads.metrics.neighbours import NeighbourProbe
from dense_heads.ops.across import total
from dense_heads.ops.seeding import forked_rng, stable_seed
from dense_heads.structures import Batch
from dense_heads.training.ssl_optim import CosineSchedule, parameter_groups

log = logging.getLogger("dense_heads")


@dataclass(frozen=True)
class Recipe:
    """How a backbone is optimised; shares are of the run's steps, so a shortened run keeps its shape."""

    max_steps: int
    lr: float  # peak
    min_lr: float = 1e-6
    warmup: float = 0.1  # share
    weight_decay: tuple[float, float] = (0.04, 0.4)
    momentum: tuple[float, float] = (0.992, 1.0)  # of the EMA
    clip_norm: float | None = 3.0  # for each module by itself
    layer_decay: float = 0.9
    patch_embed_lr: float = 0.2
    freeze_last_layer: float = 0.01  # share
    schedules: dict[str, Callable[[int], float]] = field(init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise UserError(f"optim.warmup={self.warmup}; expected a share of the run, at least 0 and below 1.")
        schedules: dict[str, Callable[[int], float]] = {
            "lr": CosineSchedule(self.lr, self.min_lr, self.max_steps, int(self.warmup * self.max_steps)),
            "weight_decay": CosineSchedule(*self.weight_decay, self.max_steps),
            "momentum": CosineSchedule(*self.momentum, self.max_steps),
        }
        object.__setattr__(self, "schedules", schedules)

    def last_layer_rests(self, step: int) -> bool:
        """Whether the prototypes are held still."""
        return step < int(self.freeze_last_layer * self.max_steps)


@dataclass(frozen=True)
class Collapse:
    """When a run is stopped because its features or its teacher say nothing any more."""

    after: float = 0.25  # share of the run before which nothing is judged: every run starts on a plateau
    min_information: float = 0.01  # nats that the teacher's assignments tell about the image
    min_rank: float = 1.5  # RankMe of the cls tokens
    patience: int = 20  # checks in a row


class BackboneTraining(pl.LightningModule):
    """Base of the modules that train a backbone.

    `student` holds what learns, one entry for each module that is clipped by itself, among them `backbone`, or of
    several students `backbone/NAME` each; `ema` holds running means of all or some of them, those of the backbones
    being the results. A subclass writes `losses`.
    """

    def __init__(
        self,
        student: dict[str, nn.Module],
        averaged: Sequence[str],
        optimizer: Callable[..., torch.optim.Optimizer],
        recipe: Recipe,
        collapse: Collapse,
        probe: NeighbourProbe | None,
        seed: int,
    ) -> None:
        """`averaged`: the entries of `student` that `ema` holds."""
        super().__init__()
        self.student = nn.ModuleDict(student).requires_grad_(True).train()
        self.ema = nn.ModuleDict({name: copy.deepcopy(student[name]) for name in averaged}).requires_grad_(False).eval()
        self.make_optimizer, self.recipe, self.collapse, self.seed = optimizer, recipe, collapse, seed
        self.probes = {} if probe is None else {name: copy.deepcopy(probe) for name in self.backbones()}
        self.results: dict[str, dict[str, float]] = {}
        self.checks_failed = 0
        self.num_views = 2  # global crops of an image
        self._clock: tuple[float, int] | None = None

    # What a subclass fills in.

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The parts of the loss, each with its weight applied."""
        raise NotImplementedError

    def backbones(self) -> dict[str, Backbone]:
        """What is kept at the end, by the student's name; a single one has none."""
        found = {name.partition("/")[2]: mean for name, mean in self.ema.items() if name.startswith("backbone")}
        return {name: backbone for name, backbone in found.items() if isinstance(backbone, Backbone)}

    def kept_heads(self) -> dict[str, Tensor]:
        """Of heads that a student of this one would need beside the backbone; empty where there are none."""
        return {}

    # Training.

    def train(self, mode: bool = True) -> Self:
        """The running means stay in eval mode."""
        super().train(mode)
        self.ema.eval()
        return self

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of the parts; stops the run when it is not finite or says nothing."""
        self._set_rates()
        with forked_rng(stable_seed("step", self.seed, self.global_step, self.global_rank), self.device):
            parts = self.losses(batch)
        loss = torch.stack(list(parts.values())).sum()
        self._stop_if_not_finite(parts, loss)
        self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True)
        self.log_dict({f"train/{name}": value.detach() for name, value in parts.items()}, sync_dist=True)
        self._log_speed(batch)
        return loss

    def _set_rates(self) -> None:
        values = {name: schedule(self.global_step) for name, schedule in self.recipe.schedules.items()}
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        rests = self.recipe.last_layer_rests(self.global_step)
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if rests and group["last_layer"] else values["lr"] * group["lr_multiplier"]
            group["weight_decay"] = values["weight_decay"] * group["wd_multiplier"]
        self.log_dict({"lr": values["lr"], "weight_decay": values["weight_decay"], "momentum": values["momentum"]})

    def _stop_if_not_finite(self, parts: dict[str, Tensor], loss: Tensor) -> None:
        bad = total((~torch.isfinite(loss.detach())).float())
        if bad > 0:
            names = [name for name, value in parts.items() if not torch.isfinite(value)] or ["of another process"]
            raise UserError(
                f"The loss is not finite at step {self.global_step} ({', '.join(names)}), so training cannot go on. "
                f"Lower optim.lr (now {self.recipe.lr:g}). The last checkpoint is kept."
            )

    def judge(self, **measured: float) -> None:
        """Count measurements that look like a collapse: `information` (nats), `rank`.

        Raises:
            UserError: too many in a row.
        """
        limits = {"information": self.collapse.min_information, "rank": self.collapse.min_rank}
        if self.global_step < self.collapse.after * self.recipe.max_steps:
            return
        low = {name: value for name, value in measured.items() if not value >= limits[name]}
        self.checks_failed = self.checks_failed + 1 if low else 0
        patience = 1 if "rank" in measured else self.collapse.patience
        if low and self.checks_failed >= patience:
            found = ", ".join(f"{name} {value:.3g} (at least {limits[name]:g})" for name, value in low.items())
            raise UserError(
                f"The training has collapsed at step {self.global_step}: {found}. All images look alike to the model. "
                "Lower optim.lr or raise the weight of koleo, or go back to an earlier checkpoint; the last is kept. "
                "task.collapse holds the limits."
            )

    def _log_speed(self, batch: Batch) -> None:
        now, images = time.monotonic(), len(batch["crops"][0]) // self.num_views * self.trainer.world_size
        if self._clock is not None and self.global_step > self._clock[1]:
            self.log("images_per_s", images * (self.global_step - self._clock[1]) / (now - self._clock[0]))
        self._clock = (now, self.global_step)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Each module by its own norm."""
        if self.recipe.clip_norm is not None:
            for name, module in self.student.items():
                norm = nn.utils.clip_grad_norm_(module.parameters(), self.recipe.clip_norm)
                self.log(f"norm/{name}", norm)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimiser; its rates are set before each step."""
        groups = parameter_groups(self.student.items(), self.recipe.layer_decay, self.recipe.patch_embed_lr)
        return self.make_optimizer([{**group, "lr": self.recipe.lr, "weight_decay": 0.0} for group in groups])

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        """The step, and the running means after it."""
        momentum = self.recipe.schedules["momentum"](self.global_step)
        super().optimizer_step(*arguments, **named)
        self.update_ema(momentum)

    @torch.no_grad()
    def update_ema(self, momentum: float) -> None:
        """Mean <- momentum * mean + (1 - momentum) * student."""
        for name, mean in self.ema.items():
            old, new = list(mean.parameters()), list(self.student[name].parameters())
            torch._foreach_mul_(old, momentum)  # type: ignore[arg-type]
            torch._foreach_add_(old, new, alpha=1 - momentum)  # type: ignore[arg-type]

    # The probe: what the features are worth, without training anything.

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        for probe in self.probes.values():
            probe.reset()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keep the cls tokens of the bank (first loader) and the queries (second)."""
        images = batch["image"]
        assert isinstance(images, Tensor)
        for name, backbone in self.backbones().items():
            tokens = backbone(images)
            self.probes[name].add("bank" if dataloader_idx == 0 else "query", tokens["cls_token"], batch["class_id"])

    def on_validation_epoch_end(self) -> None:
        """Log the k-NN accuracy and the rank of the features."""
        if not self.probes:
            return
        found = {
            f"{name}/{metric}".lstrip("/"): value
            for name, probe in self.probes.items()
            for metric, value in probe.measure().items()
        }
        self.results["val"] = found
        self.log_dict({f"val/{name}": value for name, value in found.items()}, rank_zero_only=True)
        self.log("step", float(self.global_step - 1), rank_zero_only=True)
        text = "  ".join(f"val/{name} {value:.4f}" for name, value in found.items())
        log.info("step %d/%d  %s", self.global_step, self.recipe.max_steps, text)
        for name, value in found.items():
            if self.trainer.state.fn == "fit" and name.endswith("rank") and not math.isnan(value):
                self.judge(rank=value)

    # Checkpoints: plain values only.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What was measured, and how many checks in a row looked bad."""
        checkpoint["results"] = dict(self.results)
        checkpoint["checks_failed"] = self.checks_failed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from there."""
        self.results = dict(checkpoint["results"])
        self.checks_failed = int(checkpoint["checks_failed"])
