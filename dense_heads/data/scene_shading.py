"""The picture of an indoor scene: a lamp with soft shadows, daylight, dark corners, highlights, a sensor."""

from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from dense_heads.data.scene_rays import Hits, slab_interval
from dense_heads.data.scene_textures import materials, smooth_step
from dense_heads.data.scene_world import SPHERE, WINDOW, Panel, Solid, World

Array = npt.NDArray[Any]


def shade(world: World, hits: Hits, focal: float, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """(H, W, 3) RGB of what the rays hit; `focal` in pixels."""
    eye = world.camera_to_world[:3, 3].astype(np.float32)
    to_eye = eye[:, None, None] - hits.point
    to_eye /= np.sqrt(_dot(to_eye, to_eye))
    # How much of a surface one pixel covers: finer patterns fade there instead of flickering.
    footprint = hits.depth_m / np.float32(focal) / np.maximum(_dot(hits.normal, to_eye), 0.05)
    albedo, gloss, glow = materials(world, hits, footprint, rng)
    light = _light(world, hits, to_eye, gloss, rng)
    radiance = albedo * light[0] + light[1]
    outside = glow.any(axis=0)
    inside = radiance[:, ~outside]
    exposure = np.exp(rng.uniform(np.log(0.1), np.log(0.4))) / max(float(inside.mean()) if inside.size else 0.0, 1e-3)
    radiance = np.where(outside, glow, radiance * np.float32(exposure))
    return _develop(radiance, rng)


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
            shares *= np.where(along > 0, smooth_step(gap, 0.86, 1.1), 1)
        else:
            near, far = slab_interval(solid, offset, way)
            inside = (np.minimum(far, 1) - np.maximum(near, 0)) * distance  # metres of the way that lie in the box
            shares *= 1 - smooth_step(inside, 0.005, 0.12)
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


def _dot(a: Array, b: Array) -> Array:
    """Of vectors along the first axis; quicker than a sum over it."""
    return np.asarray(a[0] * b[0] + a[1] * b[1] + a[2] * b[2])
