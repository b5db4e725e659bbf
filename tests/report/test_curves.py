import warnings

import pytest
from PIL import Image
from run_folders import write_curves

from dense_heads.errors import UserError
from dense_heads.report.curves import draw_curves, figure_bytes, read_series, save_curves


def test_empty_and_non_finite_cells_are_left_out(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,train/loss,val/miou\n1,0,0.5,\n2,0,nan,0.25\n3,0,,\n4,1,0.25,inf\n")
    series = read_series(path)
    assert series["train/loss"].steps == [1, 4] and series["train/loss"].values == [0.5, 0.25]
    assert series["val/miou"].steps == [2] and set(series) == {"train/loss", "val/miou"}


def test_a_last_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,epoch,train/loss\n1,0,0.5\n2,0")
    assert read_series(path)["train/loss"].steps == [1]


@pytest.mark.parametrize("text", ["step,train/loss\n1,0.5\n2,loss\n3,0.1\n", "step,lr\nx,0.5\n1,0.5\n"])
def test_cells_that_are_no_numbers_are_named_with_their_line(tmp_path, text):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"metrics.csv, line \d: could not convert"):
        read_series(path)


def test_a_file_without_steps_or_with_other_bytes_is_refused(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"\xff\xfe\x00\x01\x02")
    with pytest.raises(UserError, match="step"):
        read_series(path)
    with pytest.raises(UserError, match="Cannot read"):
        read_series(tmp_path / "absent.csv")
    path.write_text("")
    assert read_series(path) == {} and draw_curves(path) == {}


def lines(figure):
    return {line.get_label(): line for line in figure.axes[0].get_lines() if not line.get_label().startswith("_")}


def test_figures_hold_the_logged_values(tmp_path):
    write_curves(tmp_path / "metrics.csv")
    figures = draw_curves(tmp_path / "metrics.csv")
    series = read_series(tmp_path / "metrics.csv")
    assert list(figures) == ["Loss", "Learning rate", "Validation"]
    assert list(lines(figures["Learning rate"])["learning rate"].get_ydata()) == series["lr"].values
    assert set(lines(figures["Validation"])) == {"mIoU", "aAcc"}
    assert list(lines(figures["Validation"])["mIoU"].get_xdata()) == series["val/miou"].steps
    pale, smooth = figures["Loss"].axes[0].get_lines()
    assert list(pale.get_ydata()) == series["train/loss"].values
    assert len(smooth.get_ydata()) == len(pale.get_ydata()) and smooth.get_ydata()[0] == pale.get_ydata()[0]


def test_parts_of_the_loss_and_rank_have_figures_of_their_own(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "step,train/loss,train/dino,train/ibot,teacher/entropy,teacher/temp,val/knn10_top1,val/rank\n"
        "0,3,1,2,2.5,0.04,,\n1,2,0.5,1.5,2.4,0.07,0.3,70\n"
    )
    figures = draw_curves(tmp_path / "metrics.csv")
    assert list(figures) == ["Loss", "Parts of the loss", "Teacher", "Validation", "Rank of the features"]
    assert {name: list(line.get_ydata()) for name, line in lines(figures["Parts of the loss"]).items()} == {
        "dino": [1, 0.5],
        "ibot": [2, 1.5],
    }
    drawn = [[list(line.get_ydata()) for line in figures[title].axes[0].get_lines()] for title in list(figures)[2:]]
    assert drawn == [[[2.5, 2.4]], [[0.3]], [[70]]]


def test_candidates_have_their_own_lines_and_the_best_are_named(tmp_path):
    names = tuple(f"linear4_lr{number}" for number in range(12))
    write_curves(tmp_path / "metrics.csv", candidates=names)
    figure = draw_curves(tmp_path / "metrics.csv")["Loss"]
    assert len(figure.axes[0].get_lines()) == 12
    assert "training" not in lines(figure)  # the sum over candidates says nothing
    assert len(lines(figure)) == 8 and "linear4_lr0" in lines(figure)
    assert "best 8 of 12" in figure.legends[0].get_title().get_text()


def test_names_with_mathematics_underscores_and_control_characters_are_drawn(tmp_path):
    path = tmp_path / "metrics.csv"
    names = ("$\\frac{x", "_hidden", "$$", "\x1b[31m", "<script>&", "名前")
    write_curves(path, steps=200, candidates=names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for figure in draw_curves(path).values():
            svg = figure_bytes(figure, ".svg")
            assert b"<script>" not in svg
    assert len(lines(draw_curves(path)["Loss"])) == len(names)


def test_saved_as_png_and_svg_and_the_same_each_time(tmp_path):
    write_curves(tmp_path / "metrics.csv", steps=300)
    files = save_curves(tmp_path / "metrics.csv", tmp_path / "curves")
    assert [file.name for file in files] == ["loss.png", "learning_rate.png", "validation.png"]
    assert all(Image.open(file).width > 500 for file in files)
    vector = save_curves(tmp_path / "metrics.csv", tmp_path / "curves", ".svg")
    before = [file.read_bytes() for file in vector]
    assert [file.read_bytes() for file in save_curves(tmp_path / "metrics.csv", tmp_path / "curves", ".svg")] == before
