"""Groups without a folder in `conf`: every `tasks/<name>/task.yaml` as an option of `task`, backbones as teachers."""

import re
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from dense_heads.errors import UserError
from dense_heads.paths import CONF_DIR, TASKS_DIR


def register_teachers() -> None:
    """The options of group `backbone` once more under `teacher`: what a student learns from is written alike."""
    store = ConfigStore.instance()
    for path in sorted((CONF_DIR / "backbone").glob("*.yaml")):
        store.store(group="teacher", name=path.stem, node=OmegaConf.load(path), provider="dense_heads")


def register_tasks(tasks_dir: Path = TASKS_DIR) -> None:
    """Store each task file in Hydra's ConfigStore, with its `name` and the `folder` that it stands in.

    Raises:
        UserError: a task file is no mapping, or carries a `# @package` header (it would be lost by this route).
    """
    register_teachers()
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
