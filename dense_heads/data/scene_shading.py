"""The colours of an indoor scene: textures, a lamp with soft shadows, light from windows, dark corners, a sensor.

As in real rooms, floors are more often of planks and ceilings more often white; but any class may have any pattern and
any colour, so that none is told by them alone.
"""

import colorsys
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from dense_heads.data.scene_rays import Hits, slab_interval
from dense_heads.data.scene_world import (
    BOX,
    CEILING,
    DOOR,
    FLOOR,
    PLANE_LABELS,
    RUG,
    SPHERE,
    WALL,
    WINDOW,
    Panel,
    Solid,
    World,
)

Array = npt.NDArray[Any]

_PATTERNS = ("plain", "stripes", "checks", "bricks", "planks", "dots", "marble")
_HABITS: dict[int, tuple[tuple[float, ...], float, tuple[float, float]]] = {
    # class: how often each pattern, how colourful (0-1), from how dark to how light
    WALL: ((8, 2, 1, 2, 1, 1, 1), 0.3, (0.45, 0.98)),
    FLOOR: ((2, 1, 3, 1, 8, 0.5, 1), 0.35, (0.2, 0.75)),
    CEILING: ((9, 1, 0.5, 0.5, 2, 0.5, 0.5), 0.12, (0.5, 1.0)),
    DOOR: ((3, 0.5, 0.5, 0.5, 4, 0.5, 1), 0.4, (0.25, 0.95)),
    WINDOW: ((5, 0.5, 0.5, 0.5, 1, 0.5, 0.5), 0.2, (0.2, 1.0)),
    RUG: ((1, 4, 3, 1, 0.5, 3, 3), 0.55, (0.2, 0.9)),
    BOX: ((2, 3, 2, 2, 3, 1, 1), 0.5, (0.25, 0.95)),
    SPHERE: ((3, 3, 2, 0.5, 0.5, 3, 2), 0.6, (0.3, 0.98)),
}
_SKIRTING_M = 0.08


def shade(world: World, hits: Hits, focal: float, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """(H, W, 3) RGB of what the rays hit; `focal` in pixels."""
    eye = world.camera_to_world[:3, 3].astype(np.float32)
    to_eye = eye[:, None, None] - hits.point
    to_eye /= np.sqrt(_dot(to_eye, to_eye))
    # How much of a surface one pixel covers: finer patterns fade there instead of flickering.
    footprint = hits.depth_m / np.float32(focal) / np.maximum(_dot(hits.normal, to_eye), 0.05)
    albedo, gloss, glow = _materials(world, hits, footprint, rng)
    light = _light(world, hits, to_eye, gloss, rng)
    radiance = albedo * light[0] + light[1]
    outside = glow.any(axis=0)
    inside = radiance[:, ~outside]
    exposure = np.exp(rng.uniform(np.log(0.1), np.log(0.4))) / max(float(inside.mean()) if inside.size else 0.0, 1e-3)
    radiance = np.where(outside, glow, radiance * np.float32(exposure))
    return _develop(radiance, rng)


def _materials(world: World, hits: Hits, footprint: Array, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Albedo (3, H, W), gloss (H, W) and the light that windows send by themselves (3, H, W)."""
    albedo, glow = np.empty_like(hits.point), np.zeros_like(hits.point)
    gloss = np.zeros_like(hits.depth_m)
    noise = _Noise(hits.uv, rng)
    table = rng.random((64, 64), dtype=np.float32)
    walls = [_Material(WALL, rng), _Material(WALL, rng)]  # all walls alike, or one that differs
    accent = int(rng.integers(4)) if rng.random() < 0.5 else -1
    skirting, has_skirting = _colour(DOOR, rng), rng.random() < 0.7
    surfaces: list[Panel | Solid | int] = [*range(len(PLANE_LABELS)), *world.panels, *world.solids]
    for index, surface in enumerate(surfaces):
        label = PLANE_LABELS[surface] if isinstance(surface, int) else surface.label
        material = walls[int(index == accent)] if label == WALL else _Material(label, rng)
        on = np.flatnonzero(hits.surface == index)
        if not on.size:
            continue
        uv = hits.uv.reshape(2, -1)[:, on]
        grain = noise.values.reshape(3, -1)[:, on]
        colour = material.colours(uv, footprint.ravel()[on], grain, table)
        if label == WALL and has_skirting:
            colour = np.where(uv[1] < _SKIRTING_M, skirting[:, None], colour)
        if isinstance(surface, Panel):
            low, high = (np.array(side, np.float32)[:, None] for side in (surface.low, surface.high))
            if surface.label == DOOR:
                colour = _door(colour, uv - low, high - low, material)
            elif surface.label == WINDOW:
                pane, colour = _window(colour, uv - low, high - low, grain, rng)
                glow.reshape(3, -1)[:, on] = pane
            elif surface.label == RUG:
                part = np.abs((uv - low) / (high - low) * 2 - 1)
                edge = part[0] ** 2 + part[1] ** 2 > 0.8 if surface.is_round else part.max(axis=0) > 0.88
                colour = np.where(edge, material.other[:, None], colour)
        albedo.reshape(3, -1)[:, on] = colour
        gloss.ravel()[on] = material.gloss
    return albedo, gloss, glow


class _Noise:
    """Three scales of smooth noise over the surface coordinates of every pixel, each in 0..1."""

    def __init__(self, uv: Array, rng: np.random.Generator) -> None:
        table = rng.random((128, 128), dtype=np.float32)
        shift = rng.uniform(200, 300, (3, 2)).astype(np.float32)
        self.values = np.stack(
            [
                cv2.remap(table, uv[0] * f + s[0], uv[1] * f + s[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
                for f, s in zip((np.float32(1.3), np.float32(6), np.float32(28)), shift, strict=True)
            ]
        )


class _Material:
    """Two colours in a pattern, with grain."""

    def __init__(self, label: int, rng: np.random.Generator) -> None:
        self.base = _colour(label, rng)
        # The second colour is a relative of the first, or any other.
        self.other = self.base * rng.uniform(0.45, 0.85) if rng.random() < 0.6 else _colour(label, rng)
        if rng.random() < 0.5:
            self.base, self.other = self.other, self.base
        habit = np.array(_HABITS[label][0])
        self.pattern = str(rng.choice(_PATTERNS, p=habit / habit.sum()))
        self.period = np.float32(np.exp(rng.uniform(np.log(0.06), np.log(0.5))))
        self.ratio = np.float32(rng.choice([1.0, 2.0, 4.0, 8.0]))
        self.turned = bool(rng.random() < 0.5)
        self.grain = rng.uniform(0.02, 0.25)
        self.gloss = np.float32(rng.choice([0.0, rng.uniform(0.02, 0.35)]))
        self.shift = rng.uniform(0, 64, (2, 1)).astype(np.float32)

    def colours(self, uv: Array, footprint: Array, grain: Array, table: Array) -> Array:
        """(3, M) at surface coordinates (2, M) in metres."""
        x, y = (uv[::-1] if self.turned else uv) / self.period + self.shift
        weight, tone = self._weight(x, y, grain, table)
        fade = np.clip(self.period / (3 * footprint), 0, 1)
        weight = 0.5 + (weight - 0.5) * fade
        shade_of = 1 + self.grain * ((grain[0] - 0.5) + (grain[1] - 0.5) + (grain[2] - 0.5) * fade) + tone * fade
        mixed = self.base[:, None] + (self.other - self.base)[:, None] * weight
        return np.asarray(np.clip(mixed * shade_of, 0.01, 0.98), dtype=np.float32)

    def _weight(self, x: Array, y: Array, grain: Array, table: Array) -> tuple[Array, Array]:
        """How much of the second colour, and how much lighter one stone or plank is than the next."""
        even = np.zeros_like(x)
        if self.pattern == "plain":
            return grain[0] * 0.4, even
        if self.pattern == "stripes":
            return _step(np.abs(x % 1 - 0.5), 0.22, 0.28), even
        if self.pattern == "checks":
            return ((np.floor(x) + np.floor(y)) % 2).astype(np.float32), even
        if self.pattern == "dots":
            return 1 - _step(np.hypot(x % 1 - 0.5, y % 1 - 0.5), 0.24, 0.32), even
        if self.pattern == "marble":
            return np.abs(np.sin(3 * x + 9 * grain[0] + 4 * grain[1])) ** 3, even
        # Bricks and planks: rows, each moved against the one before; planks run on with their own grain.
        row = np.floor(y)
        along = x / self.ratio + row * np.float32(0.382)
        tone = table[row.astype(np.int64) % 64, np.floor(along).astype(np.int64) % 64] - 0.5
        if self.pattern == "planks":
            joint = 1 - np.minimum(_step(y % 1, 0.0, 0.05), _step(along % 1, 0.0, 0.03))
            return np.maximum(joint, np.abs(np.sin(9 * y + 7 * grain[0])) * 0.3), 0.35 * tone
        gap = np.minimum(np.minimum(y % 1, 1 - y % 1), self.ratio * np.minimum(along % 1, 1 - along % 1))
        return 1 - _step(gap, 0.04, 0.07), 0.25 * tone


def _door(colour: Array, place: Array, size: Array, material: _Material) -> Array:
    """A frame, two or three sunken fields, a knob."""
    u, v = place / size
    fields = 2 + int(material.period > 0.2)
    row = v * fields % 1
    border = np.minimum(np.minimum(u - 0.14, 0.86 - u) * size[0], np.minimum(row - 0.1, 0.9 - row) * size[1] / fields)
    colour = colour * (1 - 0.55 * (np.abs(border) < 0.015) + 0.12 * (border > 0.015)).astype(np.float32)
    frame = np.minimum(np.minimum(place[0], size[0] - place[0]), size[1] - place[1]) < 0.05
    colour = np.where(frame, material.other[:, None], colour)
    knob = (place[0] - 0.09) ** 2 + (place[1] - 1.0) ** 2 < 0.03**2
    return np.where(knob, np.float32(0.75), colour)


def _window(colour: Array, place: Array, size: Array, grain: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """The light through the panes (zero on the bars), and the bars."""
    u, v = place / size
    top, low, ground = (_colour(BOX, rng)[:, None] for _ in range(3))
    level = rng.choice([rng.uniform(0.05, 0.2), rng.uniform(0.3, 1.3)])
    horizon = np.float32(rng.uniform(0.1, 0.6)) + (grain[0] - 0.5) * np.float32(0.3)
    sky = low + (top - low) * np.clip((v - 0.4) / 0.6, 0, 1) + 0.3 * (grain[0] - 0.5)
    view = np.where(v > horizon, sky, ground * (0.6 + 0.8 * grain[1]))
    columns, rows = int(rng.integers(1, 4)), int(rng.integers(1, 3))
    bar_m = np.float32(0.035)
    from_bar = np.minimum(
        np.minimum(u * columns % 1, 1 - u * columns % 1) * size[0] / columns,
        np.minimum(v * rows % 1, 1 - v * rows % 1) * size[1] / rows,
    )
    pane = np.where(from_bar > bar_m, np.clip(view, 0.02, 1) * np.float32(level), 0)
    return np.asarray(pane, dtype=np.float32), colour


def _light(world: World, hits: Hits, to_eye: Array, gloss: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """What falls on each pixel's surface (3, H, W), and what it mirrors of the lamp (3, H, W)."""
    warm = np.array([1.0, rng.uniform(0.82, 1.0), rng.uniform(0.62, 1.0)], np.float32)[:, None, None]
    cold = np.array([rng.uniform(0.75, 1.0), rng.uniform(0.88, 1.0), 1.0], np.float32)[:, None, None]
    strength = rng.uniform(1.0, 3.0)
    open_sky = _openness(world, hits)
    to_lamp = world.lamp.astype(np.float32)[:, None, None] - hits.point
    distance = np.sqrt(_dot(to_lamp, to_lamp))
    direction = to_lamp / distance
    facing = np.maximum(_dot(hits.normal, direction), 0)
    lit = facing * _lit(world.solids, hits.point, to_lamp, facing) / (0.6 + 0.25 * distance * distance)
    half_way = direction + to_eye
    half_way /= np.sqrt(_dot(half_way, half_way)) + np.float32(1e-6)
    mirrored = np.maximum(_dot(half_way, hits.normal), 0)
    for _ in range(5):  # to the 32nd power; much quicker than asking for it at once
        mirrored = mirrored * mirrored
    mirrored = mirrored * gloss * (lit > 0)
    falling = (0.35 + 0.15 * hits.normal[2]) * open_sky * cold + np.float32(strength) * lit * warm
    for panel in world.panels:
        if panel.label == WINDOW:
            falling = falling + _daylight(world, panel, hits, rng) * open_sky * cold
    return falling, mirrored * warm


def _daylight(world: World, panel: Panel, hits: Hits, rng: np.random.Generator) -> Array:
    """Light of a window, as from a lamp in its middle that shines into the room."""
    axis, side = divmod(panel.plane, 2)
    middle = np.zeros(3, np.float32)
    middle[axis] = world.room_m[axis] * side
    middle[1 - axis], middle[2] = ((low + high) / 2 for low, high in zip(panel.low, panel.high, strict=True))
    ray = middle[:, None, None] - hits.point
    squared = _dot(ray, ray) + np.float32(0.3)
    inwards = np.abs(ray[axis]) / np.sqrt(squared)
    facing = np.maximum(_dot(ray, hits.normal) / np.sqrt(squared), 0)
    return np.asarray(facing * inwards / squared * np.float32(rng.uniform(0.2, 2.0)), dtype=np.float32)


def _openness(world: World, hits: Hits) -> Array:
    """Ambient occlusion: dark corners of the room, dark floor around what stands on it."""
    open_sky = np.ones_like(hits.depth_m)
    for axis in range(3):
        for wall in (0.0, float(world.room_m[axis])):
            gap = np.abs(hits.point[axis] - np.float32(wall))
            away = 1 - np.abs(hits.normal[axis])  # a surface does not darken itself
            open_sky *= 1 - np.float32(0.4) * away * np.exp(gap * np.float32(-3.5))
    for solid in world.solids:
        ray = solid.centre.astype(np.float32)[:, None, None] - hits.point
        squared = _dot(ray, ray)
        towards = np.maximum(_dot(ray, hits.normal), 0) / np.sqrt(squared)
        size = np.float32(np.cbrt(np.prod(solid.half)) ** 2)
        open_sky *= 1 - np.minimum(towards * size / np.maximum(squared, size), 1) * np.float32(0.75)
    return open_sky


def _lit(solids: tuple[Solid, ...], point: Array, to_lamp: Array, facing: Array) -> Array:
    """How much of the lamp each point sees, 0..1; `to_lamp` reaches the lamp at parameter 1."""
    lit = np.ones_like(facing)
    # The lamp hangs above all solids: what lies higher than they do is in no shadow.
    top = np.float32(max((solid.centre[2] + solid.half[2] for solid in solids), default=0.0))
    on = np.flatnonzero((facing > 0) & (point[2] < top))
    points, way = point.reshape(3, -1)[:, on], to_lamp.reshape(3, -1)[:, on]
    squared = _dot(way, way)
    distance = np.sqrt(squared)
    shares = np.ones_like(distance)
    for solid in solids:
        offset = points - solid.centre.astype(np.float32)[:, None]
        if solid.label == SPHERE:
            along = -_dot(offset, way) / squared
            miss = offset + np.clip(along, 0, 1) * way
            gap = np.sqrt(_dot(miss, miss)) / np.float32(solid.half[0])
            shares *= np.where(along > 0, _step(gap, 0.86, 1.1), 1)
        else:
            near, far = slab_interval(solid, offset, way)
            inside = (np.minimum(far, 1) - np.maximum(near, 0)) * distance  # metres of the way that lie in the box
            shares *= 1 - _step(inside, 0.005, 0.12)
    lit.ravel()[on] = shares
    return lit


def _develop(radiance: Array, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Light -> 8 bits: white balance, lens blur and vignette, highlights rolled off, gamma, noise."""
    balance = rng.uniform(0.9, 1.1, 3).astype(np.float32)
    image = np.ascontiguousarray((radiance * balance[:, None, None]).transpose(1, 2, 0))
    image = cv2.GaussianBlur(image, (3, 3), 0.55)
    height, width = image.shape[:2]
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)[None]
    image *= (1 - np.float32(rng.uniform(0, 0.15)) * (x * x + y * y))[..., None]
    image = 1 - np.exp(-1.6 * image)
    image = np.sqrt(np.maximum(image, 0)) * 255  # about the gamma of displays, and much quicker than a power
    noise = rng.standard_normal(image.shape, dtype=np.float32) * np.float32(rng.uniform(1, 4))
    return np.asarray(np.clip(image + noise + 0.5, 0, 255), dtype=np.float32).astype(np.uint8)


def _colour(label: int, rng: np.random.Generator) -> Array:
    """(3,) linear RGB of any hue, as colourful and as light as the class has it."""
    _, colourful, (dark, light) = _HABITS[label]
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.beta(1.2, 1.2 / colourful - 0.4), rng.uniform(dark, light))
    return np.asarray(np.array(rgb) ** 2.0 * 0.9 + 0.02, dtype=np.float32)


def _dot(a: Array, b: Array) -> Array:
    """Of vectors along the first axis; quicker than a sum over it."""
    return np.asarray(a[0] * b[0] + a[1] * b[1] + a[2] * b[2])


def _step(x: Array, low: float, high: float) -> Array:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((x - np.float32(low)) / np.float32(high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), dtype=np.float32)
