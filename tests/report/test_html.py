import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from run_folders import write_run

from dense_heads.errors import UserError
from dense_heads.report.html import write_report

PUBLISHED = {"value": 47.7, "unit": "%", "source": "DINOv2 model card", "row": "vitl14, linear"}
OFFICIAL = {"name": "vitl14", "weights": "official", "seed": None, "fingerprint": "ab12", "parameters": 304368640}


class Page(HTMLParser):
    """Collects text, tags and images, and checks that tags close."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.images, self.words, self.balanced = [], [], [], [], True
        self.feed(source)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attributes))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        self.balanced &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style",):
            self.words.append(data)


def report(folder):
    path = write_report(folder)
    page = Page(path.read_text(encoding="utf-8"))
    assert path == folder / "report.html" and page.balanced and not page.open
    return page


def test_a_whole_run_is_one_page_without_scripts_or_links(tmp_path):
    page = report(write_run(tmp_path / "run"))
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert all(image["src"].startswith("data:image/") for image in page.images) and len(page.images) == 6
    assert "http" not in (tmp_path / "run/report.html").read_text().replace("http-equiv", "")
    for words in ("linear4", "vits14_reg", "2,000 steps", "32.4 %", "Sky", "86.4 %", "One confusion matrix", "677bb0e",
                  "2 CPU cores", "11.7 min", "num_classes: 11", "22.1 M parameters", "last step"):  # fmt: skip
        assert words in page.text, words
    assert (tmp_path / "run/report.html").stat().st_size < 8_000_000
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_random_backbone_is_named_so_beside_the_baseline(tmp_path):
    text = report(write_run(tmp_path / "run")).text
    assert "The backbone is random: it has learnt nothing." in text
    assert "raw pixels, trained in the same way, scores 24.2 %; this run 32.4 %" in text
    assert "8.2 points above it" in text and "There is no published number" in text


def test_trained_backbones_and_raw_pixels_are_not_called_random(tmp_path):
    assert "random" not in report(write_run(tmp_path / "a", backbone=OFFICIAL)).text
    pixels = {"name": "pixels", "weights": None, "parameters": 0}
    text = report(write_run(tmp_path / "b", backbone=pixels)).text
    assert "has learnt nothing" not in text and "(no parameters)" in text


def test_the_published_number_stands_beside_ours_or_says_why_not(tmp_path):
    same = report(write_run(tmp_path / "a", backbone=OFFICIAL, published=PUBLISHED | {"comparable": True})).text
    assert "Published, same set-up 47.7 %" in same and "15.3 points below it" in same and "Not comparable" not in same
    unclear = PUBLISHED | {"comparable": True, "unit": "points"}
    text = report(write_run(tmp_path / "c", backbone=OFFICIAL, published=unclear)).text
    assert "47.7 points" in text and "below it" not in text
    reasons = ["batch 8, not 16", "half of the training images"]
    other = PUBLISHED | {"comparable": False, "not_comparable": reasons}
    text = report(write_run(tmp_path / "b", backbone=OFFICIAL, published=other)).text
    assert "Not comparable: batch 8, not 16 half of the training images" in text and "points below it" not in text


def test_missing_parts_are_left_out(tmp_path):
    folder = write_run(
        tmp_path / "run", per_class=[], protocol=None, baseline=None, seconds=None, notes=None, commit=None
    )
    for name in ("metrics.csv", "config.yaml", "card.json"):
        (folder / name).unlink()
    for file in folder.rglob("*.png"):
        file.unlink()
    text = report(folder).text
    assert "32.4 %" in text
    for heading in ("Curves", "Pictures", "Classes", "Files", "Candidates", "commit"):
        assert heading not in text, heading


def test_the_grid_of_candidates_is_shown_and_cut(tmp_path):
    folder = write_run(tmp_path / "run")
    rows = "".join(f"{number},head_{number:04},0.5\n" for number in range(130))
    (folder / "grid.csv").write_text("rank,name,val/miou\n" + rows)
    text = report(folder).text
    assert "head_0000" in text and "head_0099" in text and "head_0100" not in text and "The first 100 of 130" in text


def test_hostile_text_is_shown_as_text(tmp_path):
    evil = "</pre></style><script>alert(1)</script><img src=x onerror=alert(1)>\x1b\ud800 $title ${body} \"'"
    folder = write_run(
        tmp_path / "run", task=evil, head={"name": evil, "parameters": evil}, notes=[evil, 3], hardware=evil,
        backbone={"name": evil, "weights": evil}, metrics={evil: 0.5, "test/miou": 0.4}, selected_on=evil,
        protocol={evil: {evil: [evil]}},
        per_class=[{"name": evil, "iou": 7e9, "acc": evil, "colour": [evil, 1, 2]}], seconds={evil: evil},
        published={"value": evil, "unit": evil, "source": evil, "row": evil, "not_comparable": [evil]},
        baseline={"name": evil, "metrics": {"test/miou": 0.1}}, versions={evil: evil}, conventions=evil, commit=evil,
    )  # fmt: skip
    (folder / "config.yaml").write_bytes(evil.encode("utf-8", "surrogatepass") + b"\xff\x00")
    (folder / "card.json").write_bytes(b"</pre><script>")
    (folder / "grid.csv").write_text("<script>,b\n<script>,<img>\n")
    Image.new("RGB", (30, 30)).save(folder / 'pictures/test/<script>" onload="x.png')
    page = report(folder)
    assert "script" not in page.tags and all(set(image) == {"alt", "src"} for image in page.images)
    assert page.tags.count("img") == 7 and "$title" in page.text and "${body}" in page.text
    assert "\x1b" not in (folder / "report.html").read_text(encoding="utf-8")


def test_many_noisy_pictures_stay_below_eight_megabytes(tmp_path):
    folder = write_run(tmp_path / "run")
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (900, 1700, 3), dtype=np.uint8))
    for number in range(8):
        noise.save(folder / f"pictures/test/noise_{number}.png", compress_level=1)
    page = report(folder)
    assert (folder / "report.html").stat().st_size < 8_000_000
    sizes = [Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))).size
             for image in page.images if "jpeg" in image["src"][:20]]  # fmt: skip
    assert len(sizes) == 11 and min(width for width, _ in sizes) >= 480
    assert all(abs(width / height - 17 / 9) < 0.02 for width, height in sizes if width < 1300)


def test_pictures_that_do_not_fit_or_cannot_be_read_are_counted(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    (folder / "pictures/test/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    (folder / "pictures/val").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "pictures/val/whole.png")
    page = report(folder)
    assert "1 of 5 pictures could not be read" in page.text and "validation" in page.text and len(page.images) == 7
    (folder / "pictures").rename(tmp_path / "aside")
    write_report(folder)
    bare = (folder / "report.html").stat().st_size
    (tmp_path / "aside").rename(folder / "pictures")
    monkeypatch.setattr("dense_heads.report.html.MAX_BYTES", bare + 16_000)  # room for the tiny picture alone
    page = report(folder)
    assert (folder / "report.html").stat().st_size < bare + 16_000
    assert "3 of 5 pictures did not fit into one file" in page.text and len(page.images) == 4


def test_a_very_long_configuration_is_cut(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_text("a: 1\n" * 100_000)
    text = report(folder).text
    assert "cut here: see the file" in text and len(text) < 300_000


def test_corrupt_numbers_are_the_users_error_and_leave_the_old_report(tmp_path):
    folder = write_run(tmp_path / "run")
    write_report(folder)
    before = (folder / "report.html").read_bytes()
    data = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(data)[:-40])
    with pytest.raises(UserError, match=r"metrics\.json cannot be read as JSON"):
        write_report(folder)
    (folder / "metrics.json").write_text(json.dumps(data))
    (folder / "metrics.csv").write_text("step,lr\n1,broken\n2,0.1\n")
    with pytest.raises(UserError, match=r"metrics\.csv, line 2"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before
