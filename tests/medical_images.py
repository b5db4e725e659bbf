"""Makers of small fake data in the layouts of medical image sets."""

import numpy as np

from tests.factories import fake_pair, save


def fake_cells(size=(60, 70), seed=0):
    """A grey picture of bright discs, and their numbers."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices(size)
    objects = np.zeros(size, np.uint16)
    for number in range(1, 9):
        y, x, r = rng.integers(5, size[0] - 5), rng.integers(5, size[1] - 5), rng.integers(4, 9)
        objects[(rows - y) ** 2 + (columns - x) ** 2 < r**2] = number
    grey = np.where(objects > 0, 170, 40) + rng.normal(0, 8, size)
    return grey.clip(0, 255).astype(np.uint8), np.searchsorted(np.unique(objects), objects).astype(np.uint16)


def make_cells(root, train=3, val=2):
    """images, annotations (0 and 1) and instances (1..n), training and validation; as dsb2018."""
    for split, first, num in (("training", 0, train), ("validation", 100, val)):
        for i in range(first, first + num):
            grey, objects = fake_cells(seed=i)
            save(root / "images" / split / f"cell{i:03d}.png", grey)
            save(root / "annotations" / split / f"cell{i:03d}.png", (objects > 0).astype(np.uint8))
            save(root / "instances" / split / f"cell{i:03d}.png", objects)
    return root


def fake_binary(seed, size=(60, 64)):
    return fake_pair(seed, size=size, num_classes=2)


def make_vessels(root, train=2, val=1):
    """CHASE_DB1: two eyes of each child; a strip that the camera did not see."""
    for split, first, num in (("training", 1, train), ("validation", 50, val)):
        for child in range(first, first + num):
            for eye in "LR":
                image, mask = fake_binary(child + 7 * (eye == "R"))
                image[:4] = 0
                save(root / "images" / split / f"Image_{child:02d}{eye}.png", image)
                save(root / "annotations" / split / f"Image_{child:02d}{eye}.png", mask)
    return root


def make_membranes(root, train=3, val=2):
    """ISBI 2012: grey slices of one stack."""
    for split, first, num in (("training", 0, train), ("validation", train, val)):
        for i in range(first, first + num):
            image, mask = fake_binary(i)
            save(root / "images" / split / f"slice_{i:02d}.png", image[..., 0])
            save(root / "annotations" / split / f"slice_{i:02d}.png", mask)
    return root


def make_kvasir(root, num=6):
    """images and masks of the same names, both JPEG; masks 0 and 255."""
    for i in range(num):
        image, mask = fake_binary(i)
        save(root / "images" / f"polyp{i}.jpg", image)
        save(root / "masks" / f"polyp{i}.jpg", np.repeat(mask[..., None] * np.uint8(255), 3, axis=2), quality=90)
    return root


def make_cvc(root, num=6):
    """`Original` and `Ground Truth`, TIFF."""
    for i in range(1, num + 1):
        image, mask = fake_binary(i)
        save(root / "Original" / f"{i}.tif", image)
        save(root / "Ground Truth" / f"{i}.tif", mask * np.uint8(255))
    return root


def make_isic(root, train=3, val=2, test=2):
    """The challenge's six folders; masks end in `_segmentation`."""
    for split, first, num in (("Training", 0, train), ("Validation", 50, val), ("Test", 80, test)):
        for i in range(first, first + num):
            image, mask = fake_binary(i)
            save(root / f"ISIC2018_Task1-2_{split}_Input" / f"ISIC_{i:07d}.jpg", image)
            path = root / f"ISIC2018_Task1_{split}_GroundTruth" / f"ISIC_{i:07d}_segmentation.png"
            save(path, mask * np.uint8(255))
    return root


def make_drive(root, train=5, test=2):
    """DRIVE: names that agree in their number only; GIF labels, 0 and 255; masks of the field of view."""
    for split, first, num in (("training", 21, train), ("test", 1, test)):
        for i in range(first, first + num):
            image, mask = fake_binary(i)
            field = np.zeros(mask.shape, np.uint8)
            field[5:-5, 5:-5] = 255
            save(root / split / "images" / f"{i:02d}_{split}.tif", image)
            save(root / split / "1st_manual" / f"{i:02d}_manual1.gif", mask * np.uint8(255))
            save(root / split / "mask" / f"{i:02d}_{split}_mask.gif", field)
    return root


IDRID = {
    "1. Microaneurysms": "MA",
    "2. Haemorrhages": "HE",
    "3. Hard Exudates": "EX",
    "4. Soft Exudates": "SE",
    "5. Optic Disc": "OD",
}


def make_idrid(root, train=5, test=2):
    """IDRiD: a folder for each label, masks that overlap, some of them absent."""
    for split, first, num in (("a. Training Set", 1, train), ("b. Testing Set", 60, test)):
        for i in range(first, first + num):
            rng = np.random.default_rng(i)
            size = (60, 64)
            image = rng.integers(60, 90, (*size, 3), dtype=np.uint8)
            for number, (label, ending) in enumerate(IDRID.items()):
                mask = np.zeros(size, np.uint8)
                top, left = rng.integers(2, 30, 2)
                mask[top : top + 20, left : left + 24] = 1
                image[mask > 0, number % 3] += 60
                if not (label.startswith("4") and i % 2):  # soft exudates are rare
                    path = root / "2. All Segmentation Groundtruths" / split / label / f"IDRiD_{i:02d}_{ending}.tif"
                    save(path, mask * np.uint8(255))
            save(root / "1. Original Images" / split / f"IDRiD_{i:02d}.jpg", image)
    return root
