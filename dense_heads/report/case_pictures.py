"""Pictures of cases at the end: the worst, the median and the best, volumes as sheets of slices."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from dense_heads.data.classes import Classes
from dense_heads.report.medical_panel import contour_panel, montage, without_ignored
from dense_heads.report.tables import format_metric, metric_label


class CasePictures:
    """Draws the cases that say most about a head, by their Dice.

    Args:
        datasets: of each stage (`val`, `test`) the data set with images, in the order of what the loader gives.
        collate: items -> batch.
        classes: names and colours.
        multilabel: whether pixels can have several labels.
    """

    def __init__(
        self,
        datasets: dict[str, Any],
        collate: Callable[[list[Any]], Any],
        classes: Classes,
        multilabel: bool = False,
    ) -> None:
        self.datasets, self.collate = datasets, collate
        self.classes, self.multilabel = classes, multilabel

    @torch.inference_mode()
    def __call__(self, module: Any, fed: Any, stage: str) -> Iterator[tuple[str, Image.Image]]:
        """(file name, picture) of each chosen case.

        Args:
            module: that has just been measured, with `details`.
            fed: the data set that the loader reads, perhaps with features in place of images.
            stage: `val` or `test`.
        """
        rows = module.details[module.leader()]["rows"]
        for what, case in chosen_cases(rows):
            places = [i for i, s in enumerate(self.datasets[stage].samples) if _case(s) == case]
            scores = ", ".join(
                f"{metric_label(name)} {format_metric(name, rows[case][name])}"
                for name in rows[case]
                if name == "dice" or name.startswith(("hd95", "aji"))
            )
            title = f"{what} case, {case}: {scores}"
            yield f"{what}-{case}", self._drawn(module, fed, stage, places, title)

    def _drawn(self, module: Any, fed: Any, stage: str, places: Sequence[int], title: str) -> Image.Image:
        images, labels, predictions = [], [], []
        for place in places:
            item = fed[place]
            batch = module.transfer_batch_to_device(self.collate([item]), module.device, 0)
            found = module.predict(batch)[module.leader()]
            images.append(self.datasets[stage].picture(place))
            labels.append(module.known(batch)[0].cpu().numpy())
            predictions.append(module.shown(found)[0].cpu().numpy())
        names, colours = self.classes.names, self.classes.colours
        if len(places) == 1:
            label = without_ignored(labels[0])
            objects = module.protocol.objects is not None
            return contour_panel(
                images[0], label, predictions[0], colours, names, title, multilabel=self.multilabel, objects=objects
            )
        grey = np.stack([image[..., 0] for image in images]) / 255
        label, prediction = (np.stack(planes, axis=-3) for planes in (labels, predictions))
        view = self.datasets[stage].view(places[0])
        return montage(grey, without_ignored(label), prediction, view, colours, names, title, self.multilabel)


def chosen_cases(rows: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    """(`worst` | `median` | `best`, case) by Dice; fewer where there are fewer cases."""
    order = sorted(rows, key=lambda case: (np.nan_to_num(rows[case]["dice"]), case))
    if len(order) < 3:
        return list(zip(("worst", "best"), order, strict=False))
    return [("worst", order[0]), ("median", order[len(order) // 2]), ("best", order[-1])]


def _case(sample: Any) -> str:
    return str(getattr(sample, "case", sample).image_id)
