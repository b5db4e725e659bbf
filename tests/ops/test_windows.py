import pytest
import torch

from dense_heads.ops.windows import average, cover, window_boxes


def test_official_grid_of_512_and_341():
    # An ADE20K image of short side 512: one row, and columns shifted back to end at the border.
    assert window_boxes((512, 683), 512, 341) == [(0, 0, 512, 512), (0, 171, 512, 683)]
    assert window_boxes((512, 1200), 512, 341) == [
        (0, 0, 512, 512),
        (0, 341, 512, 853),
        (0, 682, 512, 1194),
        (0, 688, 512, 1200),
    ]


def test_an_image_no_larger_than_the_window_is_one_window():
    assert window_boxes((100, 512), 512, 341) == [(0, 0, 100, 512)]
    assert window_boxes((300, 600), 512, 341) == [(0, 0, 300, 512), (0, 88, 300, 600)]


@pytest.mark.parametrize("window", [1, 2, 5, 8])
def test_grid_against_the_written_out_rule(window):
    # mmseg's rule as it is written: ceil((length - window) / stride) + 1 windows, ends clipped, then starts.
    for stride in range(1, window + 1):
        for height in range(1, 20):
            for width in (1, 7, 13):
                expected = []
                for row in range(max(height - window + stride - 1, 0) // stride + 1):
                    for column in range(max(width - window + stride - 1, 0) // stride + 1):
                        bottom = min(row * stride + window, height)
                        right = min(column * stride + window, width)
                        expected.append((max(bottom - window, 0), max(right - window, 0), bottom, right))
                assert window_boxes((height, width), window, stride) == expected


def mean(size, boxes, maps):
    return average(zip(boxes, maps, strict=True), cover(size, boxes, torch.device("cpu")))


def test_average_divides_each_pixel_by_its_windows():
    maps = [torch.tensor([[[3.0, 3.0, 3.0]]]), torch.tensor([[[5.0, 5.0, 5.0]]])]
    assert mean((1, 4), [(0, 0, 1, 3), (0, 1, 1, 4)], maps).tolist() == [[[3.0, 4.0, 4.0, 5.0]]]


def test_average_of_bfloat16_maps_is_kept_in_float32():
    # In bfloat16 256 + 1 is 256.
    maps = [torch.full((1, 1, 1), value, dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0, 1.0)]
    found = mean((1, 1), [(0, 0, 1, 1)] * 4, maps)
    assert found.dtype == torch.float32
    assert found.item() == 259 / 4


def test_a_gap_between_windows_is_never_passed_on():
    with pytest.raises(AssertionError, match="cover"):
        mean((1, 4), [(0, 0, 1, 2)], [torch.ones(1, 1, 2)])
