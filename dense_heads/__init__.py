"""Everything that can stand on a frozen DINOv2.

The public Python API: `load_backbone`, `load_head`, `load_model` and `UserError`. Imported lazily, so that the command
can answer `--help` without PyTorch.
"""

from typing import TYPE_CHECKING, Any

from dense_heads.errors import UserError

if TYPE_CHECKING:
    from dense_heads.backbones.weights import load_backbone
    from dense_heads.build.released import load_head
    from dense_heads.models.artefact import load_model

__all__ = ["UserError", "load_backbone", "load_head", "load_model"]


def __getattr__(name: str) -> Any:
    if name == "load_backbone":
        from dense_heads.backbones.weights import load_backbone

        return load_backbone
    if name == "load_head":
        from dense_heads.build.released import load_head

        return load_head
    if name == "load_model":
        from dense_heads.models.artefact import load_model

        return load_model
    raise AttributeError(f"module 'dense_heads' has no attribute {name!r}")
