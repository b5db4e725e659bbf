"""One trial of a sweep: a whole run in a folder of its own, on a backbone that is there already."""

import contextlib
import gc
import logging
import math
import shutil
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dense_heads.build.config import as_command, plain
from dense_heads.build.data import SPLIT_FILE
from dense_heads.build.heads import backbone
from dense_heads.build.parts import Parts, make_parts
from dense_heads.build.values import refuse_bad_values
from dense_heads.errors import UserError
from dense_heads.models.dense import FrozenBackbone
from dense_heads.modes.fit import keep
from dense_heads.modes.folder import keep_run
from dense_heads.modes.learning import train, validate
from dense_heads.modes.outcome import Measured
from dense_heads.ops.files import write_atomically
from dense_heads.training.loggers import finish_loggers
from dense_heads.training.reporting import Report, Reporting


class Trials:
    """Runs trials one after another in one process; a frozen backbone stays while its config does."""

    def __init__(self, base: Sequence[str], output_dir: str) -> None:
        """`base`: what was typed for every trial; `output_dir`: of the command, where a cache may lie."""
        self.base, self.output_dir = list(base), output_dir
        self.folder, self.with_bar = Path(), False
        self._backbone: tuple[dict[str, Any], FrozenBackbone] | None = None
        self._checked: list[Any] = []

    def begin(self, folder: Path, with_bar: bool) -> None:
        """`folder`: the sweep's, which trials are run in; `with_bar`: show the progress of each training."""
        self.folder, self.with_bar = folder.resolve(), with_bar

    def folder_of(self, number: int) -> Path:
        """Where a trial lives."""
        return self.folder / "trials" / f"{number:04d}"

    @contextlib.contextmanager
    def composed(self, overrides: Sequence[str], pictures: bool = False) -> Iterator[DictConfig]:
        """A trial's config, inside the block also that of the command; pictures are drawn of the best one only."""
        with as_command([*self.base, *overrides]) as cfg:
            refuse_bad_values(cfg)
            cfg.output_dir = self.output_dir
            if cfg.trainer.devices == "auto":
                cfg.trainer.devices = 1  # several are several workers
            for name, wanted in (("pictures", pictures), ("progress", self.with_bar)):
                if not wanted and name in (cfg.callbacks or {}):
                    cfg.callbacks[name] = None
            if "wandb" in (cfg.logger or {}) and not any("logger.wandb.group=" in typed for typed in self.base):
                cfg.logger.wandb.group = "-".join(self.folder.parts[-2:])
            yield cfg

    def parts(self, cfg: DictConfig, frozen: FrozenBackbone | None = None, **more: Any) -> Parts:
        """What a trial is made of; data that have been checked are not checked again."""
        frozen = self.frozen(cfg) if frozen is None else frozen
        data = [plain(cfg.data), plain(cfg.task.data), cfg.task.get("num_classes")]
        made = make_parts(cfg, check=data not in self._checked, frozen=frozen, **more)
        self._checked = [data]
        return made

    def frozen(self, cfg: DictConfig) -> FrozenBackbone:
        """The config's backbone; the one of before where nothing about it has changed, unless it learns."""
        if cfg.backbone.trainable:
            self._backbone = None
            return backbone(cfg)
        wanted = plain(cfg.backbone)
        if self._backbone is None or self._backbone[0] != wanted:
            self._backbone = None  # let go of one before the other is there
            self._backbone = (wanted, backbone(cfg))
        return self._backbone[1]

    def run(self, number: int, overrides: Sequence[str], report: Report) -> float | None:
        """Train a trial, from its own checkpoint where there is one; its validation score, None if `report` ended it.

        Raises:
            UserError: a value that does not work, a loss or a score that is not finite.
        """
        folder = self.folder_of(number)
        folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / SPLIT_FILE).is_file() and not (folder / SPLIT_FILE).is_file():
            write_atomically(
                folder / SPLIT_FILE, (self.folder / SPLIT_FILE).read_bytes()
            )  # all hold out the same images
        with _log_into(folder / "log.txt"), self.composed(overrides) as cfg:
            cfg.resume, cfg.run_dir = "auto", str(folder)
            parts = self.parts(cfg)
            keep_run(folder, cfg)
            reporting = Reporting(report)
            trained = train(cfg, parts, folder, [reporting])
            if reporting.stopped:
                finish_loggers(trained.loggers, {})
                return None
            validate(trained.trainer, parts)
            scores = parts.module.results["val"].scores[parts.module.leader()]
            seconds = trained.seconds
            measured = Measured(
                cfg, parts, "val", trained.trainer.global_step, seconds, HydraConfig.get().runtime.choices
            )
            keep(folder, measured)
            finish_loggers(trained.loggers, {f"val/{name}": value for name, value in scores.items()})
            score = scores[parts.module.primary]
            if math.isnan(score):
                raise UserError(f"val/{parts.module.primary} is not a number: nothing was there to measure.")
        del trained, parts, reporting, measured
        gc.collect()  # module and trainer hold each other
        return score

    def clear(self, number: int) -> None:
        """Drop a finished trial's checkpoints; its head stays."""
        shutil.rmtree(self.folder_of(number) / "checkpoints", ignore_errors=True)


@contextlib.contextmanager
def _log_into(path: Path) -> Iterator[None]:
    """What is said inside the block goes into a file; of the sweep itself, to where it always goes."""
    log = logging.getLogger("dense_heads")
    shown = list(log.handlers)
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))

    def of_the_sweep(record: logging.LogRecord) -> bool:
        return record.name == "dense_heads.sweep"

    for handler in shown:
        handler.addFilter(of_the_sweep)
    log.addHandler(file)
    try:
        yield
    except Exception:
        with path.open("a", encoding="utf-8") as end:
            end.write(traceback.format_exc())
        raise
    finally:
        log.removeHandler(file)
        file.close()
        for handler in shown:
            handler.removeFilter(of_the_sweep)
