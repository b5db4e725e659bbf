"""Rays into a room: which surface each pixel sees, exactly where, and how it is turned.

Camera frame: x right, y down, z along the optical axis (OpenCV); pixel centres have whole coordinates.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dense_heads.data.scene_world import PLANE_LABELS, SPHERE, Solid, World
from dense_heads.structures import Size

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Hits:
    """Where the ray of each pixel ends."""

    depth_m: Array  # (H, W)
    surface: Array  # (H, W) 0-5 planes of the room, then the panels, then the solids
    point: Array  # (3, H, W) world
    normal: Array  # (3, H, W) world, towards the room
    uv: Array  # (2, H, W) metres along the surface


def cast(world: World, intrinsics: Array, size: Size) -> Hits:
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
    far_side = ray > 0
    room, start = (a.astype(f32)[:, None, None] for a in (world.room_m - origin, -origin))
    t = np.where(far_side, room, start) / ray
    depth = np.minimum(np.minimum(t[0], t[1]), t[2])
    axis = np.where(t[2] == depth, 2, np.where(t[1] == depth, 1, 0)).astype(np.uint8)
    side = np.where(axis == 2, far_side[2], np.where(axis == 1, far_side[1], far_side[0]))
    surface = 2 * axis + side
    first = len(PLANE_LABELS) + len(world.panels)
    for i, solid in enumerate(world.solids):
        # Only the part of the image that the ball around the solid can cover is looked at.
        window = _window(solid, world.camera_to_world, intrinsics, size)
        here = _distance(solid, origin, ray[(slice(None), *window)])
        nearer = here < depth[window]
        depth[window][nearer] = here[nearer]
        surface[window][nearer] = first + i
    point = origin.astype(f32)[:, None, None] + ray * depth
    inwards = 1 - 2 * side.astype(f32)
    normal = np.stack([inwards * (axis == a) for a in range(3)])
    uv = np.stack([np.where(axis == 0, point[1], point[0]), np.where(axis == 2, point[1], point[2])])
    flat_surface, flat_uv = surface.ravel(), uv.reshape(2, -1)
    for i, panel in enumerate(world.panels):
        on = np.flatnonzero(flat_surface == panel.plane)
        middle = (np.array(panel.low) + panel.high) / 2
        half = (np.array(panel.high) - panel.low) / 2
        a, b = (np.abs(flat_uv[k, on] - f32(middle[k])) / f32(half[k]) for k in (0, 1))
        flat_surface[on[a * a + b * b < 1 if panel.is_round else (a < 1) & (b < 1)]] = len(PLANE_LABELS) + i
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
            wide = ray.astype(np.float64)  # b * b - a * c takes nearly equal numbers from each other
            a = wide[0] * wide[0] + wide[1] * wide[1] + wide[2] * wide[2]
            b = offset[0] * wide[0] + offset[1] * wide[1] + offset[2] * wide[2]
            t = (-b - np.sqrt(b * b - a * (offset @ offset - solid.half[0] ** 2))) / a
            return np.where(t > 0, t, np.inf).astype(np.float32)
        near, far = slab_interval(solid, offset, ray)
        return np.where((near < far) & (near > 0), near, np.float32(np.inf))


def slab_interval(solid: Solid, offset: Array, ray: Array) -> tuple[Array, Array]:
    """Ray parameters of entering and leaving a box; entering > leaving where it is missed.

    Args:
        solid: a box.
        offset: the rays' origin less the box's centre, (3,) or (3, ...).
        ray: (3, ...).
    """
    cos, sin = np.float32(np.cos(solid.yaw)), np.float32(np.sin(solid.yaw))
    near = np.full(ray.shape[1:], -np.inf, np.float32)
    far = -near
    turned = (
        (cos * offset[0] + sin * offset[1], cos * ray[0] + sin * ray[1]),
        (cos * offset[1] - sin * offset[0], cos * ray[1] - sin * ray[0]),
        (offset[2], ray[2]),
    )
    for (start, step), half in zip(turned, solid.half.astype(np.float32), strict=True):
        inverse = 1 / np.where(step == 0, np.float32(1e-12), step)  # along a face: met far outside, or never
        middle = -np.asarray(start, np.float32) * inverse
        reach = half * np.abs(inverse)
        near, far = np.maximum(near, middle - reach), np.minimum(far, middle + reach)
    return near, far


def rotation_about_z(yaw: float) -> Array:
    """(3, 3): a solid's own frame -> world."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])


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
