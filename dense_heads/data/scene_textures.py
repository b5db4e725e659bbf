"""What the surfaces of an indoor scene are made of: patterns, grain, doors, windows.

As in real rooms, floors are more often of planks and ceilings more often white; but any class may have any pattern and
any colour, so that none is told by them alone.
"""

import colorsys
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from dense_heads.data.scene_rays import Hits
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


def materials(world: World, hits: Hits, footprint: Array, rng: np.random.Generator) -> tuple[Array, Array, Array]:
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
        own = np.random.default_rng(rng.integers(2**63))  # what one looks like does not hang on which are seen
        material = walls[int(index == accent)] if label == WALL else _Material(label, own)
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
                pane, colour = _window(colour, uv - low, high - low, grain, own)
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
            return smooth_step(np.abs(x % 1 - 0.5), 0.22, 0.28), even
        if self.pattern == "checks":
            return ((np.floor(x) + np.floor(y)) % 2).astype(np.float32), even
        if self.pattern == "dots":
            return 1 - smooth_step(np.hypot(x % 1 - 0.5, y % 1 - 0.5), 0.24, 0.32), even
        if self.pattern == "marble":
            return np.abs(np.sin(3 * x + 9 * grain[0] + 4 * grain[1])) ** 3, even
        # Bricks and planks: rows, each moved against the one before; planks run on with their own grain.
        row = np.floor(y)
        along = x / self.ratio + row * np.float32(0.382)
        tone = table[row.astype(np.int64) % 64, np.floor(along).astype(np.int64) % 64] - 0.5
        if self.pattern == "planks":
            joint = 1 - np.minimum(smooth_step(y % 1, 0.0, 0.05), smooth_step(along % 1, 0.0, 0.03))
            return np.maximum(joint, np.abs(np.sin(9 * y + 7 * grain[0])) * 0.3), 0.35 * tone
        gap = np.minimum(np.minimum(y % 1, 1 - y % 1), self.ratio * np.minimum(along % 1, 1 - along % 1))
        return 1 - smooth_step(gap, 0.04, 0.07), 0.25 * tone


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


def _colour(label: int, rng: np.random.Generator) -> Array:
    """(3,) linear RGB of any hue, as colourful and as light as the class has it."""
    _, colourful, (dark, light) = _HABITS[label]
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.beta(1.2, 1.2 / colourful - 0.4), rng.uniform(dark, light))
    return np.asarray(np.array(rgb) ** 2.0 * 0.9 + 0.02, dtype=np.float32)


def smooth_step(x: Array, low: float, high: float) -> Array:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((x - np.float32(low)) / np.float32(high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t), dtype=np.float32)
