"""Probabilities that follow the edges of their image."""

from torch import Tensor

from dense_heads.errors import UserError


def guided(probabilities: Tensor, image: Tensor, radius: int, eps: float) -> Tensor:
    """The guided filter (He et al., ECCV 2010) of kornia.

    Args:
        probabilities: (K, H, W).
        image: (1, H, W) of the same size, 0 to 1.
        radius: of its window in pixels.
        eps: contrast (squared) below which it smooths.

    Returns:
        (K, H, W), 0 to 1.

    Raises:
        UserError: kornia is not installed.
    """
    try:
        from kornia.filters import guided_blur
    except ImportError as error:
        raise UserError(
            "task.refine.guided_radius needs kornia, which is not installed: pip install 'dense-heads[medical]'."
        ) from error
    filtered: Tensor = guided_blur(image[None].to(probabilities), probabilities[None], 2 * radius + 1, eps)[0]
    return filtered.clamp(0, 1)
