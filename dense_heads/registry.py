"""Benchmarks: every `tasks/<name>/task.yaml` becomes the option `<name>` of Hydra's group `task`."""

import re
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from dense_heads.errors import UserError
from dense_heads.paths import TASKS_DIR


def register_tasks(tasks_dir: Path = TASKS_DIR) -> None:
    """Store each task file in Hydra's ConfigStore, with its `name` and the `folder` that it stands in.

    Raises:
        UserError: a task file is no mapping, or carries a `# @package` header (it would be lost by this route).
    """
    store = ConfigStore.instance()
    for path in sorted(tasks_dir.glob("*/task.yaml")):
        if re.match(r"(?:\s*#.*\n)*?\s*#\s*@package", path.read_text(encoding="utf-8")):
            raise UserError(
                f"{path}: a task file cannot have a '# @package' header. Remove it: tasks stand under `task`."
            )
        node = OmegaConf.load(path)
        if not isinstance(node, DictConfig):
            raise UserError(
                f"{path}: a task file must be a mapping of keys to values. Start from tasks/camvid/task.yaml."
            )
        node["name"] = path.parent.name
        node["folder"] = str(path.parent)
        store.store(group="task", name=path.parent.name, node=node, provider="dense_heads")
