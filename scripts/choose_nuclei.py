"""Choose the images that ship with the project for `task=nuclei`: a small, even part of a larger set of nuclei.

    python scripts/choose_nuclei.py SOURCE       # SOURCE/{images,annotations}/{training,validation}/*.png, SPLIT.csv

Each split is chosen from its own split. Within a modality every image size gets images in proportion to its share (at
least one), spread over the smaller three quarters of its files; files above 250 kB are taken only where a modality has
no others. No random numbers: the same source gives the same choice.
"""

import argparse
import csv
import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

QUOTAS = {
    "training": {"fluorescence": 37, "histology": 10, "brightfield": 1},
    "validation": {"fluorescence": 12, "histology": 4},
}
LARGE = 250_000  # bytes of image and annotation together
MOST = 4_000_000
SMALLER_SHARE = 0.75  # only the smallest would be nearly empty pictures


@dataclass(frozen=True, order=True)
class Candidate:
    """One image of the source with its annotation."""

    num_bytes: int
    name: str
    image: Path
    annotation: Path


def candidates(source: Path, split: str) -> dict[str, dict[str, list[Candidate]]]:
    """The images of a split: modality -> image size -> smallest file first."""
    table = source / f"{split}.csv"
    if not table.is_file():
        sys.exit(f"No {table}: expected {split}.csv with the columns name, modality, width, height beside images/.")
    found: dict[str, dict[str, list[Candidate]]] = defaultdict(lambda: defaultdict(list))
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name = row["name"]
            image, mask = (source / kind / split / f"{name}.png" for kind in ("images", "annotations"))
            num_bytes = image.stat().st_size + mask.stat().st_size
            found[row["modality"]][f"{row['width']}x{row['height']}"].append(Candidate(num_bytes, name, image, mask))
    return {modality: {size: sorted(ones) for size, ones in sizes.items()} for modality, sizes in found.items()}


def choose(sizes: dict[str, list[Candidate]], quota: int) -> list[Candidate]:
    """`quota` images of one modality, its image sizes in proportion."""
    small = {size: [one for one in ones if one.num_bytes <= LARGE] for size, ones in sizes.items()}
    pools = {size: ones for size, ones in sorted(small.items()) if ones}
    if not pools:
        return sorted(one for ones in sizes.values() for one in ones)[:quota]
    total = sum(len(ones) for ones in pools.values())
    shares = {size: max(1, quota * len(ones) // total) for size, ones in pools.items()}
    while sum(shares.values()) != quota:  # rounding: the largest size pool gives or takes
        largest = max(pools, key=lambda size: (len(pools[size]), size))
        shares[largest] += 1 if sum(shares.values()) < quota else -1
    chosen = []
    for size, count in shares.items():
        reach = max(count, round(SMALLER_SHARE * len(pools[size])))
        chosen += [pools[size][(2 * index + 1) * reach // (2 * count)] for index in range(count)]
    return sorted(chosen)


def main() -> None:
    """Choose, check the size, copy, and print what was taken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with images/, annotations/ and SPLIT.csv")
    default = Path(__file__).parents[1] / "tasks" / "nuclei" / "data"
    parser.add_argument("--target", type=Path, default=default, help="default: tasks/nuclei/data")
    arguments = parser.parse_args()
    if any(arguments.target.rglob("*.png")):
        sys.exit(f"{arguments.target} holds images already; remove them first, or give another --target.")
    chosen: dict[str, list[Candidate]] = {}
    for split, quotas in QUOTAS.items():
        found = candidates(arguments.source, split)
        chosen[split] = []
        for modality, quota in quotas.items():
            taken = choose(found[modality], quota)
            chosen[split] += taken
            print(f"{split}: {len(taken)} {modality}, {sum(one.num_bytes for one in taken) / 1e6:.2f} MB")
    total = sum(one.num_bytes for ones in chosen.values() for one in ones)
    if total > MOST:
        sys.exit(f"The choice is {total / 1e6:.2f} MB; at most {MOST / 1e6:.0f} MB may ship. Lower QUOTAS or LARGE.")
    for split, ones in chosen.items():
        for kind in ("images", "annotations"):
            (arguments.target / kind / split).mkdir(parents=True, exist_ok=True)
        for one in ones:
            shutil.copyfile(one.image, arguments.target / "images" / split / one.image.name)
            shutil.copyfile(one.annotation, arguments.target / "annotations" / split / one.annotation.name)
    print(f"{sum(map(len, chosen.values()))} images, {total / 1e6:.2f} MB -> {arguments.target}")


if __name__ == "__main__":
    main()
