"""Where the configuration and the benchmarks stand: inside the package (wheel) or beside it (checkout)."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_ROOT = _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent

CONF_DIR = _ROOT / "conf"
TASKS_DIR = _ROOT / "tasks"
