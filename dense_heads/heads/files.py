"""Head weights as they lie in files. Nothing in a file is ever executed."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from dense_heads.errors import UserError


class _IgnoredDtype:
    """Stands in for `numpy.dtype` while a checkpoint is read."""

    def __init__(self, *args: object) -> None: ...
    def __setstate__(self, state: object) -> None: ...


def _ignored_scalar(*args: object) -> None:
    """Stands in for numpy's scalar reconstruction while a checkpoint is read."""


# mmcv checkpoints keep a few numpy scalars beside the weights (best score, time), which `weights_only=True` refuses.
# We do not want their values, so their names lead to stand-ins: numpy's own unpickling, which sets flags of C
# structures from the file's bytes, never runs.
_SCALAR_GLOBALS = [
    (_ignored_scalar, "numpy.core.multiarray.scalar"),  # written by numpy 1
    (_ignored_scalar, "numpy._core.multiarray.scalar"),  # written by numpy 2
    (_IgnoredDtype, "numpy.dtype"),
]


def weights_file(path: Path) -> Path:
    """The file itself: of a folder, the artefact in it.

    Raises:
        UserError: there is none.
    """
    if path.is_dir():
        path = path / "head.safetensors"
    if not path.is_file():
        raise UserError(
            f"There is no head weights file {path}. Expected a released .pth, a head.safetensors, or the folder of a "
            "run; or head.weights=official for a released head."
        )
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The file's tensors by name, whatever it is wrapped in.

    Raises:
        UserError: damaged, hostile, or no state dict of tensors.
    """
    try:
        if path.suffix == ".safetensors":
            content: object = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals(list(_SCALAR_GLOBALS)):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file fails in a dozen ways; the original's advice would be to trust it
        raise UserError(
            f"{path} cannot be read as weights ({type(error).__name__}): it is damaged or cut short, or holds Python "
            "objects beyond tensors and plain values, which are never loaded because they could run code. Fetch it "
            "again from where it was released."
        ) from error
    if isinstance(content, Mapping):
        content = content.get("state_dict", content)
    if not (isinstance(content, Mapping) and content and all(isinstance(key, str) for key in content)):
        raise UserError(f"{path} holds no weights; expected a state dict, or one under 'state_dict'.")
    strangers = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if strangers:
        raise UserError(f"{path} holds {listed(strangers)} that are no tensors; expected a state dict of tensors.")
    return dict(content)


def listed(keys: Iterable[str]) -> str:
    """The first few keys, for a message."""
    ordered = sorted(keys)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "") or "none"
