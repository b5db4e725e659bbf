"""Weights made for colour pictures, on images of any number of channels: the patch embedding is adapted."""

from torch import Tensor

from dense_heads.backbones.formats import State
from dense_heads.errors import unknown_name

POLICIES = ("mean", "sum")
_COLOURS = 3
_KEY = "patch_embed.proj.weight"  # (D, C, patch, patch)


def adapt_channels(state: State, in_channels: int, policy: str) -> State:
    """The state with a patch embedding for `in_channels` channels, where it has one for three colours.

    Every new channel answers as a grey picture repeated to three colours would (the sum over them). With `sum` the
    answers add up: right where one channel at a time is not empty. With `mean` they are divided by `in_channels`, so
    that equal channels give what one grey picture gave, and activations keep their scale. For one channel both are
    the same.

    Args:
        state: official keys.
        in_channels: wanted.
        policy: `mean` or `sum`.

    Raises:
        UserError: an unknown policy.
    """
    if policy not in POLICIES:
        raise unknown_name("channel_weights", str(policy), POLICIES)
    weight = state.get(_KEY)
    if weight is None or weight.ndim != 4 or weight.shape[1] != _COLOURS or in_channels == _COLOURS:
        return state  # what fits, and what the strict check will refuse
    grey: Tensor = weight.sum(dim=1, keepdim=True) / (in_channels if policy == "mean" else 1)
    return {**state, _KEY: grey.repeat(1, in_channels, 1, 1)}
