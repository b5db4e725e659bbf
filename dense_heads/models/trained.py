"""A backbone that learns with its head, run as a frozen one is."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from dense_heads.backbones.base import Backbone
from dense_heads.errors import UserError
from dense_heads.models.dense import FrozenBackbone
from dense_heads.structures import FeatureRequest, Levels


class TrainedBackbone(FrozenBackbone):
    """What `backbone.trainable=true` makes of a backbone: gradients, an own parameter group, a place in checkpoints.

    It computes in float32 (`trainer.precision` mixes) and stays in eval mode: stochastic depth sleeps.
    """

    learns = True

    def __init__(
        self,
        backbone: Backbone,
        patch_fit: str = "pad",
        pass_size: int | None = None,
        compile: bool = False,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
    ) -> None:
        """As FrozenBackbone, with its own learning rate and weight decay.

        Raises:
            UserError: a baseline without a network, or a pass of no images.
        """
        if not any(True for _ in backbone.parameters()):
            raise UserError(f"backbone={backbone.name} has nothing to train. Use a ViT, or backbone.trainable=false.")
        self._origin = backbone.fingerprint()
        super().__init__(backbone, patch_fit, "float32", pass_size, compile)
        self.lr, self.weight_decay = lr, weight_decay

    @property
    def origin(self) -> str:
        """Fingerprint of the weights that the run started from."""
        return self._origin

    def _settle(self) -> None:
        self.backbone.requires_grad_(True)

    def learn_for(self, requests: Sequence[FeatureRequest]) -> None:
        """Leave out what no request reaches: DDP waits for every parameter that learns."""
        self.backbone.norm.requires_grad_(any(request.norm for request in requests))
        mask_token = getattr(self.backbone, "mask_token", None)
        if isinstance(mask_token, nn.Parameter):
            mask_token.requires_grad_(False)

    def learning(self) -> Iterator[nn.Parameter]:
        """The parameters that do."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def forward(self, images: Tensor, requests: Sequence[FeatureRequest]) -> Levels:
        """As of the frozen one, with gradients."""
        return self._levels(images, requests)
