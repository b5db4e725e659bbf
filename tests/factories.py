"""Makers of small fake data in the official on-disk layouts: true folders and formats, pixels that can be learnt."""

from pathlib import Path

import numpy as np
from PIL import Image

DATA = Path(__file__).parents[1] / "../shared/data"  # real samples; tests that read them skip where absent


def fake_pair(seed, size=(48, 64), num_classes=3):
    """An image of coloured blocks, and the mask of their classes (all of them occur)."""
    rng = np.random.default_rng(seed)
    blocks = np.r_[np.arange(num_classes), rng.integers(0, num_classes, 48 - num_classes)]
    blocks = rng.permutation(blocks).reshape(6, 8)
    mask = np.kron(blocks, np.ones((size[0] // 6 + 1, size[1] // 8 + 1), int))[: size[0], : size[1]]
    shades = np.linspace(20, 230, num_classes)
    image = np.stack([shades[mask], 255 - shades[mask], 60 + shades[mask] / 2], -1) + rng.normal(0, 8, (*size, 3))
    return image.clip(0, 255).astype(np.uint8), mask.astype(np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def make_pairs(images, masks, num, first_seed=0, shift=0, image_suffix=".png", mask_end=".png", **options):
    """`num` pairs in two folders; `shift` is added to the labels."""
    for seed in range(first_seed, first_seed + num):
        image, mask = fake_pair(seed, **options)
        save(images / f"pic{seed:03d}{image_suffix}", image)
        save(masks / f"pic{seed:03d}{mask_end}", mask + np.uint8(shift))


def make_ade20k(root, train=6, val=3, num_classes=3):
    """images/training + annotations/training; labels from 1 on, 0 = unlabelled."""
    for split, num, seed in (("training", train, 0), ("validation", val, 100)):
        folders = root / "images" / split, root / "annotations" / split
        make_pairs(*folders, num, seed, shift=1, image_suffix=".jpg", num_classes=num_classes)
        for path in sorted(folders[1].iterdir()):
            mask = np.array(Image.open(path))
            mask[:4] = 0
            save(path, mask)
    return root


def make_voc(root, train=4, val=2, aug=3):
    """VOCdevkit/VOC2012 with palette masks, 255 on the borders; `aug` images more where it is not 0."""
    folder = root / "VOCdevkit" / "VOC2012"
    lists = folder / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    parts = [
        ("train", train, "SegmentationClass"),
        ("val", val, "SegmentationClass"),
        ("aug", aug, "SegmentationClassAug"),
    ]
    seed = 0
    for name, num, masks in parts:
        if not num:
            continue
        ids = [f"2007_{seed + i:06d}" for i in range(num)]
        for i, name_of_image in enumerate(ids):
            image, mask = fake_pair(seed + i, num_classes=21)
            mask[:2] = 255
            save(folder / "JPEGImages" / f"{name_of_image}.jpg", image)
            palette = Image.fromarray(mask, mode="P")
            palette.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
            (folder / masks).mkdir(exist_ok=True)
            palette.save(folder / masks / f"{name_of_image}.png")
        (lists / f"{name}.txt").write_text("\n".join(ids) + "\n")
        seed += num
    return root / "VOCdevkit"


def make_cityscapes(root, train=3, val=2):
    """leftImg8bit and gtFine with two cities; labelIds 7 road, 11 building, 23 sky, 0 unlabelled."""
    ids = np.array([7, 11, 23, 0], np.uint8)
    for split, num in (("train", train), ("val", val)):
        for i in range(num):
            city = ("aachen", "bochum")[i % 2]
            image, mask = fake_pair(i + 50 * (split == "val"), num_classes=4)
            name = f"{city}_{i:06d}_000019"
            save(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", image)
            save(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", ids[mask])
            save(root / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png", ids[mask].astype(np.uint16) * 1000)
    return root
