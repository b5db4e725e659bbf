"""Where curves go: `metrics.csv` always; Weights & Biases and TensorBoard by choice."""

import csv
import logging
import os
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from dense_heads.ops.files import write_atomically

log = logging.getLogger("dense_heads")


class MetricsCsv(Logger):
    """`metrics.csv`: one row for each logged step, one column for each metric, appended as the run goes."""

    def __init__(self, path: Path) -> None:
        """`path` of the file; an existing one is continued (see `cut_back`)."""
        super().__init__()
        self.path = path
        self.rows: dict[int, dict[str, str]] = {}
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = {int(row["step"]): {k: v for k, v in row.items() if v} for row in csv.DictReader(file)}
        self.written: list[str] = []  # the columns that stand in the file

    @property
    def name(self) -> str:
        """Lightning asks for one."""
        return "csv"

    @property
    def version(self) -> str:
        """Lightning asks for one."""
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The run folder holds the config."""

    def cut_back(self, step: int) -> None:
        """Forget what lies after `step`: a resumed run writes it again."""
        self.rows = {at: row for at, row in self.rows.items() if at <= step}
        self._write_all()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add to the row of `step`."""
        row = {name: f"{float(value):.8g}" for name, value in metrics.items() if name != "epoch"}
        at = (step or 0) + 1  # Lightning counts steps from 0; a row says how many were done
        merged = at in self.rows
        self.rows.setdefault(at, {"step": str(at)}).update(row)
        if merged or any(name not in self.written for name in row):
            self._write_all()
        else:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.written).writerow(self.rows[at])

    @rank_zero_only
    def _write_all(self) -> None:
        columns = dict.fromkeys(name for at in sorted(self.rows) for name in self.rows[at])
        self.written = ["step", *(name for name in columns if name != "step")]
        lines = [",".join(self.written)]
        lines += [",".join(self.rows[at].get(name, "") for name in self.written) for at in sorted(self.rows)]
        write_atomically(self.path, ("\n".join(lines) + "\n").encode())


def wandb_logger(
    folder: Path, config: Mapping[str, Any], project: str, group: str | None, tags: list[str], mode: str
) -> Logger:
    """Weights & Biases in the run folder; `mode=auto` works offline where there is no key or no network.

    A resumed run goes on with the same W&B run: its id is kept in the run folder.
    """
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    if mode == "auto":
        reason = _why_offline(wandb)
        mode = "offline" if reason else "online"
        if reason:
            log.info("wandb works offline: %s.", reason)
    id_file = folder / "wandb_id.txt"
    if not id_file.is_file() and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    name = "-".join(folder.parts[-3:])
    return WandbLogger(
        project=project,
        group=group,
        tags=list(tags),
        name=name,
        id=id_file.read_text(encoding="utf-8") if id_file.is_file() else None,
        save_dir=str(folder),
        offline=mode == "offline",
        mode=mode,  # Lightning's `offline` alone sets an environment variable that wandb may have read before
        resume=None if mode == "offline" else "allow",
        config=dict(config),
    )


def _why_offline(wandb: Any) -> str | None:
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return f"WANDB_MODE={os.environ['WANDB_MODE']}"
    if not (os.environ.get("WANDB_API_KEY") or wandb.login(prompt=False, verify=False)):
        return "there is no API key (wandb login)"
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    name, _, port = host.partition(":")
    try:
        socket.create_connection((name, int(port or 443)), timeout=3).close()
    except OSError as error:
        return f"{host} cannot be reached ({error})"
    return None


def finish_loggers(loggers: list[Logger], summary: Mapping[str, float]) -> None:
    """Write the final numbers as W&B's summary, close, and print the line that uploads an offline run."""
    for logger in loggers:
        if type(logger).__name__ == "WandbLogger" and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            run: Any = getattr(logger, "experiment")  # noqa: B009 - WandbLogger's, which is not imported here
            run.summary.update(dict(summary))
            offline, folder = run.offline, Path(run.dir).parent
            run.finish()
            if offline:
                log.info("To upload the offline run: wandb sync %s", folder)
        else:
            logger.finalize("success")


def abandon_loggers(loggers: list[Logger]) -> None:
    """Close what a run that failed leaves open: W&B would take it for the run that follows in the same process."""
    for logger in loggers:
        if type(logger).__name__ == "WandbLogger" and getattr(logger, "_experiment", None) is not None:
            getattr(logger, "experiment").finish(exit_code=1)  # noqa: B009 - as above
