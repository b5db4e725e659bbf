"""Makers of small fake data in the official on-disk layouts: true folders and formats, pixels that can be learnt."""

import json
from functools import cache
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from dense_heads.paths import CONF_DIR
from dense_heads.registry import register_tasks

DATA = Path(__file__).parents[1] / "../shared/data"  # real samples; tests that read them skip where absent


@cache
def composed(*overrides):
    """The config that the command would compose, resolved; shared between tests, so it cannot be written to."""
    register_tasks()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("config", list(overrides))
    OmegaConf.resolve(cfg)
    OmegaConf.set_readonly(cfg, True)
    return cfg


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


def make_camvid(root, train=4, val=2):
    """images/ and annotations/ with 11 classes and 11 = void, as SegNet's CamVid."""
    for split, num, seed in (("training", train, 0), ("validation", val, 100)):
        make_pairs(
            root / "images" / split, root / "annotations" / split, num, seed, image_suffix=".jpg", num_classes=12
        )
    return root


def make_nuclei(root, train=4, val=2):
    """images/ and annotations/ with background and nucleus."""
    for split, num, seed in (("training", train, 0), ("validation", val, 100)):
        make_pairs(root / "images" / split, root / "annotations" / split, num, seed, num_classes=2)
    return root


def fake_depth(seed, size=(48, 64), near=1.0, far=6.0):
    """An image that is darker the farther its pixels are, and the metres, float32; a hole of zeros at the top left."""
    rng = np.random.default_rng(seed)
    rows, columns = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]), indexing="ij")
    depth_m = near + (far - near) * (0.6 * (1 - rows) + 0.4 * np.abs(columns - rng.uniform()))
    shade = 240 - 200 * (depth_m - near) / (far - near)
    image = shade[..., None] * np.array([1.0, 0.9, 0.8]) + rng.normal(0, 4, (*size, 3))
    depth_m[: size[0] // 8, : size[1] // 8] = 0
    return image.clip(0, 255).astype(np.uint8), depth_m.astype(np.float32)


def save_depth(path, depth_m, scale=1000):
    """16-bit PNG with `scale` units per metre."""
    return save(path, np.round(depth_m * scale).astype(np.uint16))


def make_depth_folders(root, train=4, val=2, size=(48, 64), far=6.0):
    """images/ and depth/ with training/ and validation/, millimetres; as nyu_scenes and rgbd_scenes."""
    for split, num, seed in (("training", train, 0), ("validation", val, 100)):
        for i in range(seed, seed + num):
            image, depth_m = fake_depth(i, size, far=far)
            save(root / "images" / split / f"pic{i:03d}.jpg", image)
            save_depth(root / "depth" / split / f"pic{i:03d}.png", depth_m)
    return root


def make_nyu_depth(root, train=3, val=2):
    """NYU Depth v2's lists, sync/ and official_splits/test/: 480 x 640, millimetres; the lists are not sorted."""
    for name, below, slash, num, seed in (
        ("train", "sync", "/", train, 0),
        ("test", "official_splits/test", "", val, 100),
    ):
        lines = []
        for i in reversed(range(num)):
            image, depth_m = fake_depth(seed + i, (480, 640))
            scene = ("bedroom", "kitchen")[i % 2]
            names = f"{scene}/rgb_{i:05d}.jpg", f"{scene}/sync_depth_{i:05d}.png"
            save(root / below / names[0], image)
            save_depth(root / below / names[1], depth_m)
            lines.append(f"{slash}{names[0]} {slash}{names[1]} 518.8579")
        (root / f"nyudepthv2_{name}_files_with_gt.txt").write_text("\n".join(lines) + "\n")
    return root


def make_kitti(root, train=3, val=2):
    """KITTI's Eigen lists, input/ and gt_depth/: sparse depth times 256, one test line without depth."""
    for name, num, seed in (("train", train, 0), ("test", val, 100)):
        lines = []
        for i in reversed(range(num)):
            size = ((375, 1242), (370, 1226))[i % 2]
            image, depth_m = fake_depth(seed + i, size, near=4, far=70)
            depth_m[np.random.default_rng(seed + i).uniform(size=size) < 0.8] = 0
            drive = f"2011_09_26_drive_{seed + i:04d}_sync"
            rgb = f"2011_09_26/{drive}/image_02/data/{i:010d}.png"
            depth = f"{drive}/proj_depth/groundtruth/image_02/{i:010d}.png"
            save(root / "input" / rgb, image, compress_level=1)
            save_depth(root / "gt_depth" / depth, depth_m, 256)
            lines.append(f"{rgb} {depth} 721.5377")
        if name == "test":
            lines.append("2011_09_26/gone_sync/image_02/data/0000000000.png None 721.5377")
        (root / f"kitti_eigen_{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def make_sun_rgbd(root, num=2):
    """SUN RGB-D's list and two sensors of other sizes; depth with its bits rotated by three to the left."""
    lines = []
    for i in range(num):
        sensor, size = (("kv1", (427, 561)), ("kv2", (530, 730)))[i % 2]
        image, depth_m = fake_depth(i, size, far=9.5)
        stored = np.round(depth_m * 1000).astype(np.uint16)
        names = f"SUNRGBD/{sensor}/a{i}/image/{i:04d}.jpg", f"SUNRGBD/{sensor}/a{i}/depth/{i:04d}.png"
        save(root / names[0], image)
        save(root / names[1], (stored << 3) | (stored >> 13))
        lines.append(" ".join(names))
    (root / "SUNRGBD_val_splits.txt").write_text("\n".join(lines) + "\n")
    return root


SHAPES = ("disc", "square", "ring")  # the classes of fake objects, each of a colour of its own


def fake_objects(seed, size=(84, 112), num=4):
    """An image with shapes on noise; boxes xyxy (n, 4) int, labels (n,), masks (n, H, W) of what is visible."""
    rng = np.random.default_rng(seed)
    image = rng.normal(90, 12, (*size, 3))
    owner = np.full(size, -1)
    labels = []
    rows, columns = np.indices(size)
    for number in range(num):
        side = int(rng.integers(18, 40))
        top, left = (int(rng.integers(0, length - side)) for length in size)
        label = int(rng.integers(len(SHAPES)))
        far = np.hypot(rows - top - (side - 1) / 2, columns - left - (side - 1) / 2) / (side / 2)
        inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        shape = (far <= 1, inside, (far <= 1) & (far > 0.5))[label]
        owner[shape] = number
        image[shape] = np.array([(220, 60, 50), (50, 90, 220), (240, 220, 60)][label]) + rng.normal(0, 8, 3)
        labels.append(label)
    masks = np.array([owner == number for number in range(num)]).reshape(num, *size)
    seen = masks.sum(axis=(1, 2)) > 20
    masks, labels = masks[seen], np.array(labels, dtype=int)[seen]
    boxes = [[m.any(0).nonzero()[0][0], m.any(1).nonzero()[0][0], m.any(0).nonzero()[0][-1] + 1,
              m.any(1).nonzero()[0][-1] + 1] for m in masks]  # fmt: skip
    return image.clip(0, 255).astype(np.uint8), np.array(boxes, dtype=int).reshape(-1, 4), labels, masks


def coco_of(scenes, first_id=7, category_ids=(2, 5, 9), classes=SHAPES):
    """A COCO file (as a dict) of (file name, what `fake_objects` gave); ids of categories have gaps."""
    from dense_heads.ops import masks as codes

    content = {"images": [], "annotations": [], "categories": []}
    for category, name in zip(category_ids, classes, strict=False):
        content["categories"].append({"id": category, "name": name, "supercategory": "shape"})
    for image_id, (name, (image, boxes, labels, masks)) in enumerate(scenes, start=first_id):
        height, width = image.shape[:2]
        content["images"].append({"id": image_id, "file_name": name, "height": height, "width": width})
        for (x0, y0, x1, y1), label, mask in zip(boxes.tolist(), labels, masks, strict=True):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": category_ids[label % len(classes)],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [height, width], "counts": codes.encode(mask)},
                }
            )
    return content


def make_coco(
    root,
    train=6,
    val=3,
    sizes=((84, 112),),
    annotations="annotations/instances_{}.json",
    images="{}",
    splits=("train", "val"),
    classes=SHAPES,
):
    """COCO JSON with two splits; one image of each split has no objects."""
    for split, num, seed in ((splits[0], train, 0), (splits[1], val, 100)):
        scenes = []
        for i in range(num):
            found = fake_objects(seed + i, sizes[i % len(sizes)], num=0 if i == 1 else 4)
            save(root / images.format(split) / f"{split}{i}.png", found[0])
            scenes.append((f"{split}{i}.png", found))
        path = root / annotations.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(coco_of(scenes, classes=classes)))
    return root


def make_voc_xml(root, year=2007, lists=(("trainval", 4), ("test", 2))):
    """VOCdevkit/VOCyear with XML files; the first object of each image is difficult where there are several."""
    folder = root / f"VOC{year}"
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "Annotations").mkdir()
    for first, (name, num) in enumerate(lists):
        ids = [f"{100 * first + i:06d}" for i in range(num)]
        for i in ids:
            image, boxes, labels, _ = fake_objects(int(i))
            save(folder / "JPEGImages" / f"{i}.jpg", image)
            objects = "".join(
                f"<object><name>{('cat', 'dog', 'person')[label]}</name><difficult>{int(k == 0 and len(boxes) > 1)}"
                f"</difficult><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
                "</bndbox></object>"
                for k, ((x0, y0, x1, y1), label) in enumerate(zip(boxes, labels, strict=True))
            )
            size = f"<size><width>{image.shape[1]}</width><height>{image.shape[0]}</height><depth>3</depth></size>"
            (folder / "Annotations" / f"{i}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(ids) + "\n")
    return root


def make_yolo(root, train=4, val=2, polygons=False):
    """data.yaml, images/ and labels/; with polygons in place of boxes (of the boxes' corners) where asked."""
    for split, num, seed in (("train", train, 0), ("val", val, 100)):
        for i in range(seed, seed + num):
            image, boxes, labels, _ = fake_objects(i)
            height, width = image.shape[:2]
            save(root / "images" / split / f"{i:03d}.png", image)
            lines = []
            for (x0, y0, x1, y1), label in zip(boxes, labels, strict=True):
                share = [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
                if polygons:
                    share = [x0 / width, y0 / height, x1 / width, y0 / height, x1 / width, y1 / height]
                lines.append(" ".join([str(label), *(f"{value:.6f}" for value in share)]))
            path = root / "labels" / split / f"{i:03d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines))
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {list(SHAPES)}\n")
    return root


def make_class_folders(root, train=4, val=2, classes=("dark", "grey", "light")):
    """train/CLASS/NAME.png and val/CLASS/NAME.png; a class is a shade."""
    for split, num in (("train", train), ("val", val)):
        for place, name in enumerate(classes):
            for index in range(num):
                image, _ = fake_pair(10 * place + index + (100 if split == "val" else 0))
                save(root / split / name / f"{index}.png", image // 8 + np.uint8(20 + 90 * place))
    return root
