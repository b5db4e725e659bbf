"""The boxes and spheres of the procedural indoor scenes, as objects to find."""

from collections.abc import Sequence
from pathlib import Path

from dense_heads.data.datasets.object_reader import ObjectReader
from dense_heads.data.datasets.scenes import SceneMasks, draw_scenes, scene_objects
from dense_heads.data.objects import DetectionSample, Objects, ObjectsBuilder, Repairs
from dense_heads.data.scenes import CLASSES, THINGS
from dense_heads.ops import masks


class SceneDetection(ObjectReader):
    """Boxes and masks of what is visible of each solid; scenes that are missing below `root` are drawn first.

    Args:
        root: where scenes are kept; the same as for `SceneMasks`, so that they are drawn once for both.
        num_train: scenes to train on.
        num_val: scenes to measure on.
        size: (height, width) of the images.
        min_pixels: solids of which less is visible are no objects: a person could not see them either.
        hint: unused, as nothing has to be got; readers all take it.

    Raises:
        UserError: see `draw_scenes`.
    """

    def __init__(
        self,
        root: str | Path,
        num_train: int = 400,
        num_val: int = 100,
        size: Sequence[int] = (240, 320),
        min_pixels: int = 30,
        hint: str = "",
    ) -> None:
        super().__init__(root, hint)
        self.categories = [CLASSES[thing] for thing in THINGS]
        self.category_ids = list(range(1, len(THINGS) + 1))
        self.folder, self.size = draw_scenes(root, num_train, num_val, size), (int(size[0]), int(size[1]))
        reader = SceneMasks(root, num_train, num_val, size)
        for split in ("train", "val"):
            self.loaded[split] = [
                DetectionSample(
                    sample.image_id, sample.image, objects=self._objects(split, sample.image_id, min_pixels)
                )
                for sample in reader.samples(split)
            ]
        self.finish()

    def _objects(self, split: str, image_id: str, min_pixels: int) -> Objects:
        found, builder = scene_objects(self.folder, split, image_id), ObjectsBuilder(self.size, Repairs(self.folder))
        for number, (box, label, mask) in enumerate(zip(found.boxes, found.labels, found.masks, strict=True)):
            if (area := int(mask.sum())) >= min_pixels:
                outline = {"size": list(self.size), "counts": masks.encode(mask)}
                builder.add(f"{image_id}, solid {number}", box.tolist(), int(label), area=area, outline=outline)
        return builder.build()
