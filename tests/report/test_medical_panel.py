import numpy as np
from PIL import Image

from dense_heads.data.volumes import Frame, view_of
from dense_heads.report import medical_panel
from dense_heads.report.medical_panel import chosen_slices, montage, tile_size, with_edges
from tests.volumes import affine_of

PALETTE = np.array([(0, 0, 0), (230, 80, 60)], dtype=np.uint8)


def test_slices_have_their_true_proportions():
    assert tile_size((50, 100), (1, 1)) == (210, 105)
    assert tile_size((50, 100), (2, 1)) == (210, 210)  # rows twice as far apart as columns
    assert tile_size((100, 50), (0.5, 2)) == (210, 105)
    assert tile_size((10, 10), (1, 1)) == (80, 80)  # small ones grow eightfold at most


def test_letters_stand_at_the_left_and_the_upper_edge():
    grey = np.full((80, 100, 3), 128, np.uint8)
    drawn = with_edges(grey, ("R", "A"))
    rows, columns = np.nonzero((drawn != grey).any(axis=2))
    assert drawn.shape == grey.shape
    left, top = columns < 20, rows < 20
    assert left.any() and top.any() and (left | top).all()
    assert (np.abs(rows[left] - 40) < 10).all() and (np.abs(columns[top] - 50) < 10).all()
    assert (with_edges(grey, ("A", "S")) != drawn).any()


def test_a_montage_counts_slices_as_the_file_does(monkeypatch):
    """Axial slices are looked at from above: the first one is the last of a file that goes upwards."""
    captions = []

    def compose(tiles, *_):
        captions.append([caption for caption, _ in tiles])
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(medical_panel, "compose", compose)
    labels = np.zeros((8, 6, 4), int)  # X, Y, Z
    labels[2:4, 2:4, 1] = 1
    for axes in ("RAS", "RAI"):
        view = view_of(Frame(labels.shape, affine_of((1, 1, 2), axes)))
        cut = view.slices(labels)
        montage(np.zeros(cut.shape), None, cut, view, PALETTE, ["background", "organ"])
    assert captions == [["slice 1"], ["slice 1"]]


def test_slices_are_spread_over_what_is_there_and_not_over_specks():
    occupied = np.zeros((40, 20, 20), bool)
    assert chosen_slices(occupied)[0] == 0 and chosen_slices(occupied)[-1] == 39
    occupied[7, 3, 3] = True
    assert chosen_slices(occupied) == [7]
    occupied[20:30, 5:15, 5:15] = True
    assert chosen_slices(occupied) == list(range(20, 30))
    occupied[2, 0, 0] = occupied[38, 19, 19] = True
    assert chosen_slices(occupied) == list(range(20, 30))
    occupied[33:36, 5:15, 5:15] = True  # a second part, large enough to count
    assert chosen_slices(occupied)[0] == 20 and chosen_slices(occupied)[-1] == 35
