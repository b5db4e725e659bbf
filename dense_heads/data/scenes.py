"""Indoor scenes without any data: a room with boxes and spheres, ray-cast by numpy, everything about it known.

Boxes of instances are xyxy with the far edge exclusive, as in COCO; the frames of world and camera are described in
`scene_world` and `scene_rays`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dense_heads.data.scene_rays import cast
from dense_heads.data.scene_shading import shade
from dense_heads.data.scene_world import BOX, CLASSES, PLANE_LABELS, SPHERE, Solid, World, draw_world
from dense_heads.errors import UserError
from dense_heads.structures import Size

__all__ = ["CLASSES", "THINGS", "VERSION", "Scene", "camera_intrinsics", "extent", "render_scene"]

Array = npt.NDArray[Any]

THINGS = (BOX, SPHERE)  # the classes that have instances; the room is one whole
VERSION = 1  # moves when the same seed gives another scene
_FIELD_OF_VIEW = np.deg2rad(70.0)  # horizontal; one camera for all scenes, so that metric depth can be learnt


@dataclass(frozen=True)
class Scene:
    """One rendered image and all that is known about it; n is the number of solids of which a pixel is visible."""

    image: npt.NDArray[np.uint8]  # (H, W, 3) RGB
    depth_m: npt.NDArray[np.float32]  # (H, W) along the optical axis (not along the ray), every pixel > 0
    labels: npt.NDArray[np.int64]  # (H, W) indices of CLASSES
    instances: npt.NDArray[np.int32]  # (H, W) 0 = room, 1..n = solids
    boxes: npt.NDArray[np.float32]  # (n, 4) xyxy: the extent of each instance's visible pixels
    box_labels: npt.NDArray[np.int64]  # (n,) BOX or SPHERE
    solids: tuple[Solid, ...]  # n
    intrinsics: npt.NDArray[np.float64]  # (3, 3)
    world: World

    @property
    def masks(self) -> npt.NDArray[np.bool_]:
        """(n, H, W): the visible pixels of each instance."""
        return np.asarray(self.instances[None] == np.arange(1, len(self.boxes) + 1)[:, None, None])


def render_scene(seed: int, size: Size = (240, 320)) -> Scene:
    """A scene that is a function of `seed` alone; another `size` shows the same room through the same camera.

    Args:
        seed: 0 or more.
        size: (height, width), each at least 8.

    Raises:
        UserError: a negative seed, or a size that is too small.
    """
    if seed < 0 or min(size) < 8:
        raise UserError(f"A scene of seed {seed} and size {list(size)} was asked for; expected seed >= 0, sides >= 8.")
    world = draw_world(np.random.default_rng([seed, 0]))
    intrinsics = camera_intrinsics(size)
    hits = cast(world, intrinsics, size)
    labels_of_surfaces = np.array(
        [*PLANE_LABELS, *(p.label for p in world.panels), *(s.label for s in world.solids)], dtype=np.int64
    )
    image = shade(world, hits, intrinsics[0, 0], np.random.default_rng([seed, 1]))
    first = len(PLANE_LABELS) + len(world.panels)
    visible = [i for i in range(len(world.solids)) if (hits.surface == first + i).any()]
    ids = np.zeros(len(labels_of_surfaces), dtype=np.int32)
    ids[[first + i for i in visible]] = np.arange(1, len(visible) + 1)
    instances = ids[hits.surface]
    return Scene(
        image=image,
        depth_m=hits.depth_m,
        labels=labels_of_surfaces[hits.surface],
        instances=instances,
        boxes=np.array([extent(instances == i + 1) for i in range(len(visible))], np.float32).reshape(-1, 4),
        box_labels=np.array([world.solids[i].label for i in visible], dtype=np.int64),
        solids=tuple(world.solids[i] for i in visible),
        intrinsics=intrinsics,
        world=world,
    )


def camera_intrinsics(size: Size) -> npt.NDArray[np.float64]:
    """(3, 3) of the one camera, at an image size: square pixels, the axis through the middle of the image."""
    height, width = size
    focal = width / 2 / np.tan(_FIELD_OF_VIEW / 2)
    return np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1.0]])


def extent(mask: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """The xyxy extent of a mask's pixels, of which there is at least one; the far edges exclusive."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
