"""What the LightningModules of all task families share.

A module trains one or more *candidates* (a head with its own loss and hyper-parameters) on one stream of features.
One head is a grid of one; nothing is special-cased. Losses are summed: the candidates share no parameter, so their
gradients cannot mix. Each has its own parameter group, schedule, clipping and random numbers: none disturbs another.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from dense_heads.errors import UserError, unknown_name
from dense_heads.heads.base import Head
from dense_heads.heads.training_free import TrainingFreeHead
from dense_heads.models.dense import FrozenBackbone
from dense_heads.models.trained import TrainedBackbone
from dense_heads.ops.across import total
from dense_heads.ops.seeding import forked_rng, stable_seed
from dense_heads.structures import Batch, Features, Levels
from dense_heads.training.optim import Momentum, Schedule


@dataclass
class Candidate:
    """A head in training, with what is its own."""

    name: str
    head: Head
    loss: nn.Module
    lr: float
    weight_decay: float
    schedule: Schedule
    clip_norm: float | None = None
    momentum: Momentum | None = None  # None: the optimiser's own
    settings: dict[str, Any] = field(default_factory=dict)  # what distinguishes it, for grid.csv
    origin: str = ""  # what its random numbers come from: the head itself, however and beside whatever it is trained


class Learner(NamedTuple):
    """A parameter group: a candidate's head, or what learns beside it."""

    parameters: list[nn.Parameter]
    lr: float
    weight_decay: float
    schedule: Schedule
    momentum: Momentum | None


@dataclass
class Result:
    """What one pass over a split measured, for each candidate."""

    step: int
    scores: list[dict[str, float]]
    per_class: list[list[dict[str, Any]]]


class DenseModule(pl.LightningModule):
    """Base of the task families: candidates, optimisation, validation and test through one shared step.

    A family says how a head's output becomes a loss (`loss`), how a batch is predicted (`predict`) and what is counted
    (`reset_metrics`, `count`, `measure`, and in `metric_names` what `measure` gives).
    """

    metric_names: tuple[str, ...] = ()
    headline: tuple[str, ...] = ()  # of them, what is said after each validation; empty: all

    def __init__(
        self,
        backbone: FrozenBackbone,
        candidates: Sequence[Candidate],
        optimizer: Callable[..., torch.optim.Optimizer],
        primary: str,
        direction: str,
        seed: int,
    ) -> None:
        """`primary` is the metric (`miou`) that ranks candidates and checkpoints, `direction` max or min."""
        super().__init__()
        if primary not in self.metric_names:
            raise unknown_name("task.metrics.primary:", primary, self.metric_names)
        self.backbone = backbone
        self.candidates = list(candidates)
        self.heads = nn.ModuleList(candidate.head for candidate in candidates)
        self.candidate_losses = nn.ModuleList(candidate.loss for candidate in candidates)
        self.make_optimizer = optimizer
        self.primary, self.direction, self.seed = primary, direction, seed
        self.retired: dict[str, int] = {}  # candidate -> the step at which its loss or gradient was not finite
        self.results: dict[str, Result] = {}  # stage -> its latest
        self.details: list[dict[str, Any]] = []  # of each candidate, where cases are measured: the latest
        self.requests = [backbone.request(candidate.head) for candidate in candidates]
        if isinstance(backbone, TrainedBackbone):
            backbone.learn_for(self.requests)

    @property
    def training_free(self) -> bool:
        """Whether its heads look at labelled images instead of learning from them."""
        return all(isinstance(head, TrainingFreeHead) for head in self.heads)

    # What a family fills in.

    def candidate_loss(self, candidate: Candidate, features: Features, batch: Batch) -> Tensor:
        """A candidate's scalar loss on one batch; families whose heads bring their own losses replace it."""
        return self.loss(candidate, candidate.head(features), features, batch)

    def loss(self, candidate: Candidate, output: Tensor, features: Features, batch: Batch) -> Tensor:
        """The scalar loss of a candidate's output."""
        raise NotImplementedError

    def predict(self, batch: Batch) -> list[list[Any]]:
        """For each candidate the predictions of the batch's images, each at its label's own size."""
        raise NotImplementedError

    def reset_metrics(self) -> None:
        """Start counting."""
        raise NotImplementedError

    def count(self, predictions: list[list[Any]], batch: Batch) -> None:
        """Add the predictions of one batch to the metrics of all candidates."""
        raise NotImplementedError

    def measure(self) -> tuple[list[dict[str, float]], list[list[dict[str, Any]]]]:
        """Scores and per-class rows of each candidate, over all processes."""
        raise NotImplementedError

    # Training.

    def losses(self, batch: Batch) -> list[Tensor]:
        """One scalar for each candidate, each with random numbers of its own."""
        levels = self._levels(batch).float()
        losses = []
        for candidate, request in zip(self.candidates, self.requests, strict=True):
            seen = levels.features(request)
            with forked_rng(
                stable_seed(self.seed, candidate.origin or candidate.name, self.global_step, self.global_rank),
                self.device,
            ):
                losses.append(self.candidate_loss(candidate, seen, batch))
        return losses

    def _levels(self, batch: Batch) -> Levels:
        """The features of a training batch: from the cache, or from a pass of the backbone."""
        if "features" in batch:
            return batch["features"]
        images = batch["image"]
        assert isinstance(images, Tensor)
        levels: Levels = self.backbone(images, self.requests)
        return levels

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sum of the candidates' losses; one that is not finite retires its candidate."""
        losses = torch.stack(self.losses(batch))
        means = total(losses.detach()) / self.trainer.world_size
        finite = torch.isfinite(means)  # all processes must agree on who goes on
        if not bool(finite.all()):
            for candidate, is_finite in zip(self.candidates, finite.tolist(), strict=True):
                if not is_finite:
                    self._retire(candidate, "loss")
        alive = torch.tensor([candidate.name not in self.retired for candidate in self.candidates], device=self.device)
        # `where` keeps a retired candidate in the graph with a zero gradient: DDP waits for every parameter.
        summed = torch.where(alive, losses, losses.detach().new_zeros(())).sum()
        names = [""] if len(self.candidates) == 1 else [f"/{candidate.name}" for candidate in self.candidates]
        for name, value, candidate in zip(names, means, self.candidates, strict=True):
            if candidate.name not in self.retired:
                self.log(f"train/loss{name}", value, prog_bar=not name)
        self.log("lr", self.optimizers().param_groups[0]["lr"], prog_bar=False)  # type: ignore[union-attr]
        return summed

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Clip each candidate by its own norm, so that one cannot slow down another; retire one that is not finite."""
        for candidate in self.candidates:
            gradients = [p.grad for p in candidate.head.parameters() if p.grad is not None]
            if not gradients:
                continue
            norm = torch.nn.utils.get_total_norm(gradients)
            if candidate.name in self.retired or not math.isfinite(norm.item()):
                self._retire(candidate, "gradient")
                for gradient in gradients:
                    gradient.zero_()
            elif candidate.clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(candidate.head.parameters(), candidate.clip_norm, norm)
        for learner in self.learners()[len(self.candidates) :]:
            norm = torch.nn.utils.get_total_norm([p.grad for p in learner.parameters if p.grad is not None])
            if not math.isfinite(norm.item()):
                self._retire(self.candidates[0], "gradient")
            elif self.candidates[0].clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(learner.parameters, self.candidates[0].clip_norm, norm)

    def _retire(self, candidate: Candidate, what: str) -> None:
        if candidate.name not in self.retired:
            self.retired[candidate.name] = self.global_step
            self.print(f"{candidate.name}: its {what} is not finite at step {self.global_step}; it is retired.")
        if len(self.retired) == len(self.candidates):
            raise UserError(
                f"The {what} is not finite at step {self.global_step}, so training cannot go on. Lower optim.lr "
                f"(now {candidate.lr:g}), or set optim.clip_norm. The last checkpoint is kept."
            )

    def learners(self) -> list[Learner]:
        """What learns: each candidate's head, then what there is beside the only candidate."""
        found = [
            Learner(list(c.head.parameters()), c.lr, c.weight_decay, c.schedule, c.momentum) for c in self.candidates
        ]
        if isinstance(self.backbone, TrainedBackbone):
            own = list(self.backbone.learning()), self.backbone.lr, self.backbone.weight_decay
            found.append(Learner(*own, found[0].schedule, found[0].momentum))
        return found

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimiser with a parameter group, and a schedule, for each of `learners`."""
        learners = self.learners()
        groups = [{"params": one.parameters, "lr": one.lr, "weight_decay": one.weight_decay} for one in learners]
        optimizer = self.make_optimizer(groups)
        # Functions, not the schedules: LambdaLR would put an object's attributes into the checkpoint and, on resume,
        # the old length of the run back into the new schedule.
        scheduler = LambdaLR(optimizer, [functools.partial(Schedule.__call__, one.schedule) for one in learners])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """A run that is resumed with another length starts at that length's learning rate, not at the old one's."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        for group, learner in zip(optimizer.param_groups, self.learners(), strict=True):
            group["lr"] = learner.lr * learner.schedule(self.global_step)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set the momentum of the coming step: a function of the step alone, so a resumed run needs no state for it."""
        for group, learner in zip(optimizer.param_groups, self.learners(), strict=True):
            if learner.momentum is not None:
                learner.momentum.apply(group, self.global_step)

    # Validation and test: they differ in name only.

    def on_validation_epoch_start(self) -> None:
        """Start counting."""
        self.reset_metrics()

    def on_test_epoch_start(self) -> None:
        """Start counting."""
        self.reset_metrics()

    def _evaluation_step(self, batch: Batch) -> dict[str, list[Any]]:
        predictions = self.predict(batch)
        self.count(predictions, batch)
        return {"prediction": predictions[self.leader()]}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, list[Any]]:
        """Predict and count; returns the leading candidate's predictions for the pictures."""
        return self._evaluation_step(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, list[Any]]:
        """As validation_step."""
        return self._evaluation_step(batch)

    def _finish(self, stage: str) -> None:
        scores, per_class = self.measure()
        self.results[stage] = Result(self.global_step, scores, per_class)
        best = scores[self.leader()]
        self.log_dict({f"{stage}/{name}": value for name, value in best.items()}, rank_zero_only=True)
        self.log("step", float(self.global_step - 1), rank_zero_only=True)  # the row in the logs, counted from 0
        if len(self.candidates) > 1:
            each = {
                f"{stage}/{self.primary}/{candidate.name}": own[self.primary]
                for candidate, own in zip(self.candidates, scores, strict=True)
            }
            self.log_dict(each, rank_zero_only=True)

    def on_validation_epoch_end(self) -> None:
        """Measure and log `val/...`."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Measure and log `test/...`."""
        self._finish("test")

    def is_measured(self, stage: str, step: int) -> bool:
        """Whether what was measured last is the heads as they are at `step`."""
        last = self.results.get(stage)
        return last is not None and last.step == step

    def ranking(self, stage: str = "val") -> list[int]:
        """Candidates from best to worst by the primary metric of a stage; retired and unmeasured ones last."""
        result = self.results.get(stage)

        def key(index: int) -> tuple[bool, float]:
            score = result.scores[index][self.primary] if result else math.nan
            lost = self.candidates[index].name in self.retired or math.isnan(score)
            return lost, 0.0 if math.isnan(score) else (-score if self.direction == "max" else score)

        return sorted(range(len(self.candidates)), key=key)

    def leader(self) -> int:
        """The candidate that stands for the run: the best on validation so far."""
        return self.ranking()[0]

    # Checkpoints: plain values only.

    def learnt(self) -> dict[str, Tensor]:
        """The heads, and the backbone where it learns: what is kept of the best step."""
        kept = dict(self.heads.state_dict())
        if self.backbone.learns:
            kept |= {f"backbone.{key}": value for key, value in self.backbone.state_dict().items()}
        return kept

    def load_learnt(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `learnt` gave."""
        start = "backbone."
        self.heads.load_state_dict({key: value for key, value in state.items() if not key.startswith(start)})
        if self.backbone.learns:
            own = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            self.backbone.load_state_dict(own)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep who is retired and what was measured, and which backbone this stood on."""
        checkpoint["retired"] = dict(self.retired)
        checkpoint["results"] = {stage: vars(result) for stage, result in self.results.items()}
        checkpoint["backbone_fingerprint"] = self.backbone.origin

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on another backbone."""
        theirs, ours = checkpoint["backbone_fingerprint"], self.backbone.origin
        if theirs != ours:
            raise UserError(
                f"The checkpoint was trained on a backbone with fingerprint {theirs}, this one has {ours}. "
                "Use the same backbone and backbone.weights."
            )
        self.retired = dict(checkpoint["retired"])
        self.results = {stage: Result(**values) for stage, values in checkpoint["results"].items()}
