import pytest
import torch

from dense_heads.ops.resize import resize


def test_is_bilinear_with_half_pixel_centres():
    x = torch.tensor([[[[0.0, 4.0]]]])
    # Centres of 4 pixels over 2: -0.25, 0.25, 0.75, 1.25, held at the ends.
    assert resize(x, (1, 4)).flatten().tolist() == [0.0, 1.0, 3.0, 4.0]


def test_shrinking_does_not_antialias():
    x = torch.tensor([[[[0.0, 0.0, 9.0, 0.0, 0.0, 0.0]]]])
    # Centres 1 and 4 of 6: antialiasing would mix in the neighbours, 9 among them.
    assert resize(x, (1, 2)).flatten().tolist() == [0.0, 0.0]


def test_equal_size_is_the_same_tensor():
    x = torch.randn(2, 3, 5, 7)
    assert resize(x, (5, 7)) is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_cpu_rounds_once(dtype):
    x = torch.randn(2, 3, 9, 11).to(dtype)
    half = resize(x, (20, 17))
    assert half.dtype == dtype
    exact = resize(x.double(), (20, 17))
    # A result's own rounding (half a unit in the last place), with room for the sum of four terms.
    assert ((half.double() - exact).abs() <= torch.finfo(dtype).eps * x.abs().max().double()).all()
