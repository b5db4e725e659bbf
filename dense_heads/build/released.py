"""Released heads by name: `dense_heads.load_head`."""

import logging
from pathlib import Path

from omegaconf import OmegaConf

from dense_heads.backbones.base import Backbone
from dense_heads.backbones.weights import load_backbone
from dense_heads.backbones.zoo import get_spec
from dense_heads.build.config import composed, composing
from dense_heads.build.heads import head_arguments, make_head
from dense_heads.build.model import make_card
from dense_heads.build.parts import family_of
from dense_heads.errors import UserError, unknown_name
from dense_heads.heads.official import num_outputs_in
from dense_heads.models.artefact import assemble
from dense_heads.models.dense import DenseModel, FrozenBackbone
from dense_heads.paths import CONF_DIR

log = logging.getLogger("dense_heads")

TASKS = {"ade20k": "ade20k", "voc2012": "voc2012", "nyu": "nyu_depth", "kitti": "kitti_depth"}


def load_head(
    name: str,
    backbone: str | Backbone = "vits14",
    weights: str | Path = "official",
    dataset: str | None = None,
    range: str | tuple[float, float] | None = None,
) -> DenseModel:
    """A released head on its backbone, ready for `predict`: prepared, windowed and ranged as its published row.

    Args:
        name: an option of group `head`: `linear`, `linear4` (the original's `ms`), `linear_depth`, `linear4_depth`,
            `dpt`.
        backbone: a name (its official weights are loaded), or a loaded backbone.
        weights: `official`, or the path of a head checkpoint.
        dataset: what the head was trained on: `ade20k`, `voc2012`, `nyu` or `kitti`. Needed with `official`; of a file
            it is read from the name or the number of classes.
        range: of depth heads: (min_m, max_m), or `hub` for what the official hub entry computes with. The default is
            what the published numbers were measured with.

    Raises:
        UserError: an unknown name, weights that are not to be had or do not fit, or a backbone with registers.
    """
    backbone_name = get_spec(backbone if isinstance(backbone, str) else backbone.name).name
    known = dataset or _dataset_of(weights)
    if known not in TASKS:
        raise unknown_name("data set of released heads", known, TASKS)
    experiment = f"{TASKS[known]}_{backbone_name.removesuffix('_reg')}_{name}"
    if not (CONF_DIR / "experiment" / f"{experiment}.yaml").is_file():
        heads = sorted({path.stem.split("_", 3)[-1] for path in (CONF_DIR / "experiment").glob(f"{TASKS[known]}_*")})
        raise unknown_name(f"released {known} head", name, heads)
    with composing():
        cfg = composed([f"experiment={experiment}", f"backbone={backbone_name}"])
    cfg.head.weights = str(weights)
    cfg.task.transforms.eval.scales, cfg.task.inference.flip = [1.0], False  # one view; several are for measuring
    if isinstance(range, str):
        cfg.head.range = range
    elif range is not None:
        cfg.head.min_m, cfg.head.max_m = range
    policy = str(OmegaConf.select(cfg, "backbone.patch_fit", default="pad"))
    frozen = FrozenBackbone(load_backbone(backbone_name) if isinstance(backbone, str) else backbone, policy)
    head = make_head(cfg, cfg.head, name, frozen, family_of(cfg).num_outputs(cfg))
    return assemble(make_card(cfg, frozen, head, name, head_arguments(cfg.head)), frozen, head)


def _dataset_of(weights: str | Path) -> str:
    """From a file's name, else from its number of classes."""
    if weights == "official":
        raise UserError(f"load_head(weights='official') needs dataset=, one of {', '.join(TASKS)}.")
    named = next((name for name in TASKS if name in Path(weights).name.lower()), None)
    by_classes = {150: "ade20k", 21: "voc2012"}
    found = named or by_classes.get(num_outputs_in(weights))
    if found is None:
        raise UserError(f"{weights} does not say what it was trained on. Say dataset=, one of {', '.join(TASKS)}.")
    return found
