"""What an indoor scene is made of, and how one is drawn: a room, things that stand in it, a camera, a lamp.

World frame: metres, z up, the room from (0, 0, 0) to `room_m`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

CLASSES = ("wall", "floor", "ceiling", "door", "window", "rug", "box", "sphere")
WALL, FLOOR, CEILING, DOOR, WINDOW, RUG, BOX, SPHERE = range(len(CLASSES))
PLANE_LABELS = (WALL, WALL, WALL, WALL, FLOOR, CEILING)  # of plane 2 * axis + (0: at zero, 1: at room_m)


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
    plane: int  # of the room, as in `PLANE_LABELS`
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


def draw_world(rng: np.random.Generator) -> World:
    """A room, and a camera in it that looks across it."""
    room = np.array([rng.uniform(3, 6.5), rng.uniform(3, 6.5), rng.uniform(2.3, 3.1)])
    position, yaw, view = _draw_view(rng, room)
    pitch, roll = np.deg2rad(rng.uniform(-24, 2)), np.deg2rad(rng.normal(0, 1.5))
    lamp = np.array([*(room[:2] * rng.uniform(0.25, 0.75, 2)), room[2] - rng.uniform(0.1, 0.5)])
    return World(
        room_m=room,
        panels=_draw_panels(rng, room, position, yaw),
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


def _draw_panels(rng: np.random.Generator, room: Array, camera: Array, yaw: float) -> tuple[Panel, ...]:
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
    if rng.random() < 0.75:
        half = np.minimum(rng.uniform(0.5, 1.4, 2), room[:2] / 2 - 0.3)
        centre = camera[:2] + rng.uniform(1.5, 3.0) * np.array(ahead)
        low, high = (np.clip(centre, half + 0.2, room[:2] - half - 0.2) + side * half for side in (-1, 1))
        panels.append(Panel(RUG, 4, (low[0], low[1]), (high[0], high[1]), is_round=bool(rng.random() < 0.4)))
    return tuple(panels)


def _draw_solids(rng: np.random.Generator, room: Array, camera: Array, yaw: float, view: float) -> tuple[Solid, ...]:
    """Solids before the camera, on the floor or on boxes, none in another; those that find no place are left out."""
    solids: list[Solid] = []
    free_tops: list[int] = []
    for _ in range(int(rng.integers(4, 12))):
        label = BOX if rng.random() < 0.55 else SPHERE
        if label == BOX:
            half = np.exp(rng.uniform(np.log([0.09, 0.09, 0.08]), np.log([0.5, 0.45, 0.6])))
        else:
            half = np.full(3, np.exp(rng.uniform(np.log(0.08), np.log(0.42))))
        turn = float(rng.uniform(0, np.pi))
        radius = _radius(half, label)
        stands_on = [i for i in free_tops if solids[i].half[:2].min() > 0.8 * radius]
        if stands_on and rng.random() < 0.6:
            chosen = int(rng.choice(stands_on))
            base = solids[chosen]
            height = base.centre[2] + base.half[2]
            if height + 2 * half[2] < 1.7:
                free_tops.remove(chosen)
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
