"""Indoor scenes without any data: a room with boxes and spheres, ray-cast by numpy, everything about it known.

World frame: metres, z up, the room from (0, 0, 0) to `room_m`. Camera frame: x right, y down, z along the optical axis
(OpenCV). Pixel centres have whole coordinates; boxes are xyxy with the far edge exclusive, as in COCO.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dense_heads.data.scene_shading import shade
from dense_heads.errors import UserError
from dense_heads.structures import Size

Array = npt.NDArray[Any]

CLASSES = ("wall", "floor", "ceiling", "door", "window", "rug", "box", "sphere")
WALL, FLOOR, CEILING, DOOR, WINDOW, RUG, BOX, SPHERE = range(len(CLASSES))
THINGS = (BOX, SPHERE)  # the classes that have instances; the room is one whole
VERSION = 1  # moves when the same seed gives another scene

_FIELD_OF_VIEW = np.deg2rad(70.0)  # horizontal; one camera for all scenes, so that metric depth can be learnt
_PLANE_LABELS = (WALL, WALL, WALL, WALL, FLOOR, CEILING)  # of plane 2 * axis + (0: at zero, 1: at room_m)


@dataclass(frozen=True)
class Solid:
    """A box or sphere, standing on the floor or on a box."""

    label: int  # BOX or SPHERE
    centre: Array  # (3,) world
    half: Array  # (3,) half of each side; of a sphere three times its radius
    yaw: float  # about z


@dataclass(frozen=True)
class Panel:
    """A flat piece of a wall or the floor: door, window or rug."""

    label: int
    plane: int  # of the room, as in `_PLANE_LABELS`
    low: tuple[float, float]  # in the plane: (along the wall, z), on the floor (x, y)
    high: tuple[float, float]
    is_round: bool = False  # the ellipse in that rectangle


@dataclass(frozen=True)
class World:
    """What there is to see and from where."""

    room_m: Array  # (3,)
    panels: tuple[Panel, ...]
    solids: tuple[Solid, ...]
    camera_to_world: Array  # (4, 4)
    lamp: Array  # (3,) world


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
        return self.instances[None] == np.arange(1, len(self.boxes) + 1)[:, None, None]


@dataclass(frozen=True)
class Hits:
    """Where the ray of each pixel ends."""

    depth_m: Array  # (H, W)
    surface: Array  # (H, W) 0-5 planes of the room, then the panels, then the solids
    point: Array  # (3, H, W) world
    normal: Array  # (3, H, W) world, towards the room
    uv: Array  # (2, H, W) metres along the surface


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
    world = _draw_world(np.random.default_rng([seed, 0]), size[0] / size[1])
    intrinsics = camera_intrinsics(size)
    hits = _cast(world, intrinsics, size)
    labels_of_surfaces = np.array(
        [*_PLANE_LABELS, *(p.label for p in world.panels), *(s.label for s in world.solids)], dtype=np.int64
    )
    image = shade(world, hits, intrinsics[0, 0], np.random.default_rng([seed, 1]))
    first = len(_PLANE_LABELS) + len(world.panels)
    visible = [i for i in range(len(world.solids)) if (hits.surface == first + i).any()]
    ids = np.zeros(len(labels_of_surfaces), dtype=np.int32)
    ids[[first + i for i in visible]] = np.arange(1, len(visible) + 1)
    instances = ids[hits.surface]
    return Scene(
        image=image,
        depth_m=hits.depth_m,
        labels=labels_of_surfaces[hits.surface],
        instances=instances,
        boxes=np.array([_extent(instances == i + 1) for i in range(len(visible))], np.float32).reshape(-1, 4),
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


def rotation_about_z(yaw: float) -> Array:
    """(3, 3): a solid's own frame -> world."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


def _draw_world(rng: np.random.Generator, aspect: float) -> World:
    room = np.array([rng.uniform(3, 6.5), rng.uniform(3, 6.5), rng.uniform(2.3, 3.1)])
    position, yaw, view = _draw_view(rng, room)
    pitch, roll = np.deg2rad(rng.uniform(-20, 4)), np.deg2rad(rng.normal(0, 1.5))
    lamp = np.array([*(room[:2] * rng.uniform(0.25, 0.75, 2)), room[2] - rng.uniform(0.1, 0.5)])
    return World(
        room_m=room,
        panels=_draw_panels(rng, room, yaw),
        solids=_draw_solids(rng, room, position, yaw, view),
        camera_to_world=_pose(position, yaw, pitch, roll),
        lamp=lamp,
    )


def _draw_view(rng: np.random.Generator, room: Array) -> tuple[Array, float, float]:
    """Camera position, direction and how far it is to the wall there: of several drawings the first with a view."""
    best = (np.zeros(3), 0.0, -1.0)
    for _ in range(30):
        position = np.array([*rng.uniform(0.4, room[:2] - 0.4), rng.uniform(1.1, 1.75)])
        yaw = float(rng.uniform(-np.pi, np.pi))
        ahead = np.array([np.cos(yaw), np.sin(yaw)])
        view = float((np.where(ahead > 0, room[:2] - position[:2], -position[:2]) / ahead).min())
        if view > best[2]:
            best = (position, yaw, view)
        if view > 2.5:
            break
    return best


def _pose(position: Array, yaw: float, pitch: float, roll: float) -> Array:
    """Camera to world, (4, 4)."""
    forward = np.array([np.cos(pitch) * np.cos(yaw), np.cos(pitch) * np.sin(yaw), np.sin(pitch)])
    right = np.array([np.sin(yaw), -np.cos(yaw), 0.0])
    down = np.cross(forward, right)
    pose = np.eye(4)
    pose[:3, 0] = np.cos(roll) * right + np.sin(roll) * down
    pose[:3, 1] = np.cos(roll) * down - np.sin(roll) * right
    pose[:3, 2], pose[:3, 3] = forward, position
    return pose


def _draw_panels(rng: np.random.Generator, room: Array, yaw: float) -> tuple[Panel, ...]:
    """Doors and windows on walls that the camera may see, none over another, and at times a rug."""
    ahead = (np.cos(yaw), np.sin(yaw))
    walls = [2 * axis + side for axis in (0, 1) for side in (0, 1) if ahead[axis] * (2 * side - 1) > -0.3]
    panels: list[Panel] = []
    for label in [DOOR] * int(rng.integers(1, 3)) + [WINDOW] * int(rng.integers(1, 3)):
        plane = int(rng.choice(walls))
        length = room[1 - plane // 2]
        if label == DOOR:
            width, bottom, top = rng.uniform(0.7, 1.0), 0.0, rng.uniform(1.9, 2.15)
        else:
            width, bottom = rng.uniform(0.6, 1.8), rng.uniform(0.5, 1.1)
            top = min(bottom + rng.uniform(0.7, 1.4), room[2] - 0.15)
        left = rng.uniform(0.15, length - width - 0.15)
        taken = [panel for panel in panels if panel.plane == plane]
        if all(left > p.high[0] + 0.15 or left + width < p.low[0] - 0.15 for p in taken):
            panels.append(Panel(label, plane, (left, bottom), (left + width, top)))
    if rng.random() < 0.7:
        half = np.minimum(rng.uniform(0.5, 1.4, 2), room[:2] / 2 - 0.3)
        centre = rng.uniform(half + 0.2, room[:2] - half - 0.2)
        low, high = centre - half, centre + half
        panels.append(Panel(RUG, 4, (low[0], low[1]), (high[0], high[1]), is_round=bool(rng.random() < 0.4)))
    return tuple(panels)


def _draw_solids(rng: np.random.Generator, room: Array, camera: Array, yaw: float, view: float) -> tuple[Solid, ...]:
    """Solids before the camera, on the floor or on boxes, none in another; those that find no place are left out."""
    solids: list[Solid] = []
    free_tops: list[int] = []
    for _ in range(int(rng.integers(3, 10))):
        label = BOX if rng.random() < 0.55 else SPHERE
        if label == BOX:
            half = np.exp(rng.uniform(np.log([0.09, 0.09, 0.08]), np.log([0.5, 0.45, 0.6])))
        else:
            half = np.full(3, np.exp(rng.uniform(np.log(0.08), np.log(0.42))))
        turn = float(rng.uniform(0, np.pi))
        radius = _radius(half, label)
        stands_on = [i for i in free_tops if solids[i].half[:2].min() > 0.8 * radius]
        if stands_on and rng.random() < 0.6:
            base = solids[stands_on[int(rng.integers(len(stands_on)))]]
            height = base.centre[2] + base.half[2]
            if height + 2 * half[2] < 1.7:
                free_tops.remove(next(i for i in stands_on if solids[i] is base))
                solids.append(Solid(label, np.array([*base.centre[:2], height + half[2]]), half, turn))
                continue
        for _ in range(8):
            angle = yaw + rng.uniform(-0.62, 0.62)
            distance = rng.uniform(radius + 0.7, max(view, radius + 1.2))
            place = camera[:2] + distance * np.array([np.cos(angle), np.sin(angle)])
            apart = all(
                np.hypot(*(place - other.centre[:2])) > radius + _radius(other.half, other.label) for other in solids
            )
            if apart and (place > radius).all() and (place < room[:2] - radius).all():
                if label == BOX:
                    free_tops.append(len(solids))
                solids.append(Solid(label, np.array([*place, half[2]]), half, turn))
                break
    return tuple(solids)


def _radius(half: Array, label: int) -> float:
    """Of the circle around a solid's footprint."""
    return float(half[0] if label == SPHERE else np.hypot(half[0], half[1]))


def _cast(world: World, intrinsics: Array, size: Size) -> Hits:
    """The nearest surface on each pixel's ray.

    Rays are (u, v, 1) in the camera frame, not unit vectors: their parameter is then the depth along the axis.
    """
    f32 = np.float32
    focal, cx, cy = intrinsics[0, 0], intrinsics[0, 2], intrinsics[1, 2]
    u = ((np.arange(size[1]) - cx) / focal)[None, :]
    v = ((np.arange(size[0]) - cy) / focal)[:, None]
    rotation, origin = world.camera_to_world[:3, :3], world.camera_to_world[:3, 3]
    ray = np.stack([(r[0] * u + r[1] * v + r[2]) for r in rotation]).astype(f32)
    ray[np.abs(ray) < 1e-7] = 1e-7  # a ray along a wall: no division by zero, and it meets the wall far outside
    inverse = 1 / ray
    to_planes = np.where(ray > 0, (world.room_m - origin).astype(f32)[:, None, None], -origin.astype(f32)[:, None, None])
    t = to_planes * inverse
    axis = t.argmin(axis=0)
    depth = t.min(axis=0)
    surface = 2 * axis + (np.take_along_axis(ray, axis[None], 0)[0] > 0)
    first = len(_PLANE_LABELS) + len(world.panels)
    for i, solid in enumerate(world.solids):
        # Only the part of the image that the ball around the solid can cover is looked at.
        window = _window(solid, world.camera_to_world, intrinsics, size)
        here = _distance(solid, origin, ray[(slice(None), *window)])
        nearer = here < depth[window]
        depth[window][nearer] = here[nearer]
        surface[window][nearer] = first + i
    point = origin.astype(f32)[:, None, None] + ray * depth
    normal, uv = np.zeros_like(point), np.empty((2, *size), f32)
    for plane in range(len(_PLANE_LABELS)):
        on = surface == plane
        normal[plane // 2][on] = -1 if plane % 2 else 1
        along = [a for a in range(3) if a != plane // 2]
        uv[:, on] = point[along][:, on]
    for i, panel in enumerate(world.panels):
        on = surface == panel.plane
        middle = (np.array(panel.low) + panel.high) / 2
        half = (np.array(panel.high) - panel.low) / 2
        a, b = (np.abs((uv[k] - f32(middle[k])) / f32(half[k])) for k in (0, 1))
        inside = on & ((a * a + b * b < 1) if panel.is_round else ((a < 1) & (b < 1)))
        surface[inside] = len(_PLANE_LABELS) + i
    for i, solid in enumerate(world.solids):
        on = surface == first + i
        if on.any():
            normal[:, on], uv[:, on] = _skin(solid, point[:, on])
    return Hits(depth, surface, point, normal, uv)


def _window(solid: Solid, camera_to_world: Array, intrinsics: Array, size: Size) -> tuple[slice, slice]:
    """Rows and columns outside which no pixel can show the solid."""
    centre = camera_to_world[:3, :3].T @ (solid.centre - camera_to_world[:3, 3])
    radius = solid.half[0] if solid.label == SPHERE else float(np.linalg.norm(solid.half))
    if centre[2] <= radius:  # beside or around the camera's own plane
        return slice(0, size[0]), slice(0, size[1])
    focal = intrinsics[0, 0]
    sides = []
    for k, middle, length in ((1, intrinsics[1, 2], size[0]), (0, intrinsics[0, 2], size[1])):
        # The ball's shadow on a line is that of the circle in the plane of this axis and the optical one.
        angle, spread = np.arctan2(centre[k], centre[2]), np.arcsin(min(1.0, radius / np.hypot(centre[k], centre[2])))
        ends = [np.tan(np.clip(a, -1.5, 1.5)) * focal + middle for a in (angle - spread, angle + spread)]
        low, high = (int(np.clip(end, -2, length + 2)) for end in ends)
        sides.append(slice(max(low - 1, 0), min(max(high + 2, 0), length)))
    return sides[0], sides[1]


def _distance(solid: Solid, origin: Array, ray: Array) -> Array:
    """The ray parameter at which each ray (3, ...) from `origin` (3,) meets the solid; infinite where it does not."""
    offset = origin - solid.centre
    with np.errstate(invalid="ignore"):
        if solid.label == SPHERE:
            a = ray[0] * ray[0] + ray[1] * ray[1] + ray[2] * ray[2]
            b = np.tensordot(offset.astype(np.float32), ray, 1)
            c = np.float32(offset @ offset - solid.half[0] ** 2)
            t = (-b - np.sqrt(b * b - a * c)) / a
            return np.where(t > 0, t, np.float32(np.inf))
        near, far = slab_interval(solid, offset, ray)
        return np.where((near < far) & (near > 0), near, np.float32(np.inf))


def slab_interval(solid: Solid, offset: Array, ray: Array) -> tuple[Array, Array]:
    """Ray parameters of entering and leaving a box; entering > leaving where it is missed.

    Args:
        solid: a box.
        offset: the rays' origin less the box's centre, (3,) or (3, ...).
        ray: (3, ...), not zero in any component of the box's frame.
    """
    cos, sin = np.float32(np.cos(solid.yaw)), np.float32(np.sin(solid.yaw))
    near, far = np.float32(-np.inf), np.float32(np.inf)
    turned = (
        (cos * offset[0] + sin * offset[1], cos * ray[0] + sin * ray[1]),
        (cos * offset[1] - sin * offset[0], cos * ray[1] - sin * ray[0]),
        (offset[2], ray[2]),
    )
    for (start, step), half in zip(turned, solid.half.astype(np.float32), strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            inverse = 1 / step
            middle = -np.asarray(start, np.float32) * inverse
        reach = half * np.abs(inverse)
        near, far = np.maximum(near, middle - reach), np.minimum(far, middle + reach)
    return near, far


def _skin(solid: Solid, point: Array) -> tuple[Array, Array]:
    """Outward normals (3, M) and surface coordinates (2, M) of points (3, M) on a solid."""
    rotation = rotation_about_z(solid.yaw).astype(np.float32)
    offset = point - solid.centre.astype(np.float32)[:, None]
    own = np.einsum("ji,jm->im", rotation, offset)
    if solid.label == SPHERE:
        radius = np.float32(solid.half[0])
        around = np.arctan2(own[1], own[0]) * radius
        return offset / radius, np.stack([around, np.arcsin(np.clip(own[2] / radius, -1, 1)) * radius])
    face = np.abs(own / solid.half.astype(np.float32)[:, None]).argmax(axis=0)
    outward = np.where(np.arange(3)[:, None] == face, np.sign(own), 0).astype(np.float32)
    # Each face starts its texture elsewhere, so that it does not run on around a corner.
    uv = np.stack([np.where(face == 0, own[1], own[0]), np.where(face == 2, own[1], own[2])]) + 3 * face
    return np.einsum("ij,jm->im", rotation, outward), uv.astype(np.float32)


def _extent(mask: Array) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
