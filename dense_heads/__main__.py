"""The command: `python -m dense_heads [mode=fit] task=... backbone=... head=... [group.key=value ...]`."""

import os
import sys
from collections.abc import Sequence

from dense_heads import command
from dense_heads.paths import CONF_DIR

# PyTorch's own switch, read at its first allocation: large tensors in pages of 2 MB where Linux has them. To get a
# 179 MB tensor in pages of 4 kB takes five times as long as to fill it, and a step on cached features makes several.
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own); returns the exit code: 0, or 2 for a user's mistake."""
    os.environ.update(HUGE_PAGES | os.environ)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if command.asks_for_help(arguments):
        return command.print_help()
    with command.user_errors(arguments) as outcome:
        command.hand_to_hydra(command.recompose(arguments), CONF_DIR)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
