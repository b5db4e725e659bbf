"""Make data sets of NYU Depth v2's labelled frames, from the two MATLAB files of its authors.

    python scripts/prepare_nyu.py nyu_depth_v2_labeled.mat splits.mat data/nyu_depth
    python scripts/prepare_nyu.py nyu_depth_v2_labeled.mat splits.mat data/nyu_depth_v2 --layout official

`pairs` (for task=nyu_scenes) writes images/ and depth/ with the official 795 training and 654 test frames, depth as the
authors filled it in. `official` (for task=nyu_depth) writes official_splits/test/ and its list: test frames with the
depth as measured and the white frame of the image blackened, as the published evaluations have them. The training
frames of task=nyu_depth are another download (sync.zip).

Needs the extra `prepare`: pip install 'dense-heads[prepare]'.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

FOCAL = 518.8579  # pixels; the toolbox of the data set's authors
INSIDE = (slice(7, 474), slice(7, 632))  # of an image: outside it undistortion left a white frame
MILLIMETRES = 1000.0


@dataclass(frozen=True)
class Frame:
    """One labelled frame."""

    index: int  # zero-based
    scene_type: str
    image: npt.NDArray[np.uint8]  # (H, W, 3)
    depth_m: npt.NDArray[np.float32]  # (H, W), 0 = no measurement


def load(module: str) -> Any:
    """A module that only this script needs."""
    try:
        return importlib.import_module(module)
    except ImportError:
        sys.exit(f"{module} is not installed; expected the extra `prepare`: pip install 'dense-heads[prepare]'.")


def frames(labeled: Path, depth_name: str, wanted: set[int]) -> Iterator[Frame]:
    """The frames with these zero-based indices; MATLAB's columns first become rows first."""
    h5py = load("h5py")
    try:
        file = h5py.File(labeled, "r")
    except OSError as error:
        sys.exit(f"{labeled}: cannot be read as HDF5 ({error}). Expected nyu_depth_v2_labeled.mat, whole (2.8 GB).")
    with file:
        missing = [name for name in ("images", depth_name, "sceneTypes") if name not in file]
        if missing:
            sys.exit(f"{labeled}: holds no {', '.join(missing)}; expected nyu_depth_v2_labeled.mat.")
        images, depths = file["images"], file[depth_name]
        num = images.shape[0]
        if images.ndim != 4 or images.shape[1] != 3 or depths.shape != (num, *images.shape[2:]):
            shapes = f"images {images.shape}, {depth_name} {depths.shape}"
            sys.exit(f"{labeled}: {shapes}; expected (n, 3, W, H) and (n, W, H).")
        if max(wanted) >= num:
            sys.exit(f"{labeled}: {num} frames, and the splits name frame {max(wanted) + 1}; expected matching files.")
        for index in sorted(wanted):
            scene_type = "".join(chr(int(letter)) for letter in file[file["sceneTypes"][0, index]][:].ravel())
            if not scene_type.isidentifier():  # it becomes the name of a folder
                sys.exit(f"{labeled}: frame {index + 1} has the scene type {scene_type!r}; expected a word.")
            yield Frame(
                index,
                scene_type,
                np.ascontiguousarray(images[index].T),
                np.ascontiguousarray(depths[index].T).astype(np.float32),
            )


def read_splits(path: Path) -> dict[str, set[int]]:
    """The official split as zero-based indices: `training` and `validation` (the test frames)."""
    try:
        content = load("scipy.io").loadmat(path)
        return {
            split: {int(index) - 1 for index in np.asarray(content[name]).ravel()}
            for split, name in (("training", "trainNdxs"), ("validation", "testNdxs"))
        }
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        sys.exit(f"{path}: no official split ({error!r}). Expected splits.mat with trainNdxs and testNdxs.")


def to_millimetres(depth_m: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """16-bit millimetres; what is not finite or too far becomes 0 = no measurement."""
    millimetres = np.round(np.nan_to_num(depth_m.astype(np.float64), posinf=0, neginf=0) * MILLIMETRES)
    return np.where((millimetres > 0) & (millimetres < 65536), millimetres, 0).astype(np.uint16)


def write_pairs(labeled: Path, splits: dict[str, set[int]], target: Path) -> None:
    """images/SPLIT/nyu_XXXXX.png and depth/SPLIT/nyu_XXXXX.png."""
    for split, wanted in splits.items():
        for kind in ("images", "depth"):
            (target / kind / split).mkdir(parents=True, exist_ok=True)
        for frame in frames(labeled, "depths", wanted):
            name = f"nyu_{frame.index:05d}.png"
            Image.fromarray(frame.image).save(target / "images" / split / name)
            Image.fromarray(to_millimetres(frame.depth_m)).save(target / "depth" / split / name)
        print(f"{split}: {len(wanted)} frames -> {target}")


def write_official(labeled: Path, wanted: set[int], target: Path) -> None:
    """official_splits/test/TYPE/{rgb,sync_depth}_XXXXX and the list of them."""
    lines = []
    for frame in frames(labeled, "rawDepths", wanted):
        folder = target / "official_splits" / "test" / frame.scene_type
        folder.mkdir(parents=True, exist_ok=True)
        image = np.zeros_like(frame.image)
        image[INSIDE] = frame.image[INSIDE]
        names = f"rgb_{frame.index:05d}.jpg", f"sync_depth_{frame.index:05d}.png"
        Image.fromarray(image).save(folder / names[0], quality=95)
        Image.fromarray(to_millimetres(frame.depth_m)).save(folder / names[1])
        lines.append(f"{frame.scene_type}/{names[0]} {frame.scene_type}/{names[1]} {FOCAL}")
    (target / "nyudepthv2_test_files_with_gt.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"test: {len(lines)} frames -> {target}")


def main(argv: list[str] | None = None) -> None:
    """Read the command line, then both files, and write the layout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labeled", type=Path, help="nyu_depth_v2_labeled.mat")
    parser.add_argument("splits", type=Path, help="splits.mat")
    parser.add_argument("target", type=Path, help="folder to write into")
    parser.add_argument("--layout", choices=("pairs", "official"), default="pairs")
    arguments = parser.parse_args(argv)
    for path in (arguments.labeled, arguments.splits):
        if not path.is_file():
            sys.exit(f"{path}: no such file; expected it from cs.nyu.edu/~silberman/datasets/nyu_depth_v2.html.")
    splits = read_splits(arguments.splits)
    if arguments.layout == "pairs":
        write_pairs(arguments.labeled, splits, arguments.target)
    else:
        write_official(arguments.labeled, splits["validation"], arguments.target)


if __name__ == "__main__":
    main()
