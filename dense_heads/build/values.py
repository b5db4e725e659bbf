"""Values that a user types and that would fail somewhere deep: refused with a word, before anything is made."""

import math

from omegaconf import DictConfig, OmegaConf

from dense_heads.errors import UserError, unknown_name

# What is often typed, and fails somewhere deep when it is wrong: key -> the least that makes sense.
_WHOLE_NUMBERS = {
    "seed": 0, "task.num_classes": 1, "data.batch_size": 1, "data.eval_batch_size": 1, "data.image_size": 1,
    "data.num_workers": 0,
    "data.in_memory": 1,
    "trainer.max_steps": 1, "trainer.val_check_interval": 1, "trainer.accumulate_grad_batches": 1,
    "trainer.log_every_n_steps": 1, "callbacks.checkpoints.every": 1, "callbacks.checkpoints.keep": 1,
    "sweep.trials": 1, "sweep.workers": 1,
}  # fmt: skip
_NUMBERS = ("optim.lr", "optim.weight_decay", "optim.clip_norm", "head.lr", "head.weight_decay", "sweep.timeout")
_CHOICES = {"task.protocol.select": ("last", "best"), "task.metrics.direction": ("max", "min")}


def refuse_bad_values(cfg: DictConfig) -> None:
    """Check what can be checked before anything is made.

    Raises:
        UserError: a number where it makes no sense, an unknown choice, or a `data` key, a teacher or students that the
            task does not use.
    """
    _refuse_bad_numbers(cfg)
    _refuse_unused_data_keys(cfg)
    for key in ("teacher", "students"):
        if cfg.get(key) is not None and cfg.task.family != "distillation":
            raise UserError(
                f"{key} is set, but task={cfg.task.name} trains no student of it. Use task=distillation; a trained "
                "head teaches by distill=RUN."
            )
    if cfg.distill is not None and "distill" not in cfg.task and cfg.mode == "fit":
        raise UserError(f"distill is set, but task={cfg.task.name} ({cfg.task.family}) learns from labels alone.")


def _refuse_bad_numbers(cfg: DictConfig) -> None:
    for key in (*_WHOLE_NUMBERS, *_NUMBERS):
        value = OmegaConf.select(cfg, key)
        if value is None and key != "seed":
            continue
        kind, least = (int, _WHOLE_NUMBERS[key]) if key in _WHOLE_NUMBERS else (int | float, 0)
        for number in value if OmegaConf.is_list(value) else [value]:
            if not isinstance(number, kind) or isinstance(number, bool) or not least <= number < math.inf:
                what = "whole number" if kind is int else "number"
                raise UserError(f"{key}={value}: expected a {what}, {least} or above.")
    for key, known in _CHOICES.items():
        if (choice := OmegaConf.select(cfg, key)) not in known:
            raise unknown_name(f"{key}:", str(choice), known)
    for key in ("trainer.limit_val_batches", "trainer.limit_test_batches"):
        if OmegaConf.select(cfg, key) == 0:
            raise UserError(f"{key}=0: a run is measured at its end. Set it to 1 or more, or to 1.0 for all.")


def _refuse_unused_data_keys(cfg: DictConfig) -> None:
    for key, value in cfg.data.items():
        if value is not None and key not in cfg.task.data:
            used = ", ".join(f"data.{name}" for name in cfg.data if name in cfg.task.data)
            raise UserError(f"data.{key} is set, but task={cfg.task.name} does not use it. It uses {used}.")
