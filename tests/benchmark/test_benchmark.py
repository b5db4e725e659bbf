"""The benchmark's protocol on contenders of known speed, and its real command."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest

from dense_heads import benchmark
from dense_heads.backbones.weights import load_backbone
from dense_heads.benchmark.backbone import operations
from dense_heads.benchmark.protocol import Case, Contender, Sample, command, measure
from dense_heads.benchmark.results import draw, verdict
from dense_heads.errors import UserError

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"


def script():
    spec = importlib.util.spec_from_file_location("benchmark_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Turns:
    """A machine that gets slower and slower: contender `name` takes `seconds` times the turn's load."""

    def __init__(self):
        self.order = []

    def contender(self, name, seconds, **options):
        def run():
            self.order.append(name)
            return Sample(seconds * (1 + len(self.order) // 3), peak_bytes=len(self.order))

        return Contender(name, run, **options)


def test_ratios_hold_where_the_load_changes():
    turns = Turns()
    case = Case(
        "a case",
        [
            turns.contender("ours", 2.0, work=8.0),
            turns.contender("theirs", 3.0, work=8.0),
            turns.contender("limit", 0.5, work=4.0, reference=True),
        ],
        goal=1.4,
    )
    (measured,) = measure([case], repeats=6, warmups=0)
    assert turns.order[:9] == ["ours", "theirs", "limit", "theirs", "limit", "ours", "limit", "ours", "theirs"]
    assert [len(samples) for samples in measured.samples.values()] == [6, 6, 6]
    assert measured.ratio("theirs") == pytest.approx(1.5, rel=0.2)
    assert measured.fastest_other() == "theirs"
    assert "reached" in verdict(measured)
    assert measured.share(case.contenders[0]) == pytest.approx(0.5, rel=0.2)  # 4 a second of 8
    assert measured.peak_bytes("limit") == max(sample.peak_bytes for sample in measured.samples["limit"])
    assert draw([measured]).get_axes()[0].get_title(loc="left") == "a case"


def test_turns_that_warm_up_do_not_count():
    turns = Turns()
    (measured,) = measure([Case("alone", [turns.contender("ours", 1.0)])], repeats=2, warmups=3)
    assert len(turns.order) == 5 and len(measured.samples["ours"]) == 2
    assert measured.fastest_other() is None and verdict(measured) == ""
    with pytest.raises(UserError, match="--repeats 0"):
        measure([], repeats=0, warmups=1)


def test_a_command_is_measured_in_a_process_of_its_own(tmp_path):
    hold = "import sys; b = bytearray(int(sys.argv[1])); b[::4096] = b'x' * len(b[::4096])"
    small, large = (
        command([sys.executable, "-c", hold, str(size)], tmp_path / str(size))() for size in (1, 200 * 2**20)
    )
    assert small.seconds > 0
    assert large.peak_bytes - small.peak_bytes == pytest.approx(200 * 2**20, rel=0.1)
    told = command([sys.executable, "-c", "print(7)"], tmp_path / "told", seconds=lambda: 42.0)()
    assert told.seconds == 42.0 and (tmp_path / "told" / "output.txt").read_text() == "7\n"
    with pytest.raises(UserError, match="ended with code 3:\nwhat it said"):
        command([sys.executable, "-c", "print('what it said'); raise SystemExit(3)"], tmp_path / "failed")()


def test_the_command_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    turns = Turns()
    part = types.ModuleType("dense_heads.benchmark.fake", "A part that measures nothing real.")
    part.add_arguments = lambda parser: parser.add_argument("--times", type=float)
    part.cases = lambda arguments, scratch: [
        Case("fake", [turns.contender("ours", 1.0), turns.contender("theirs", arguments.times)], goal=2.0)
    ]
    monkeypatch.setitem(sys.modules, "dense_heads.benchmark.fake", part)
    monkeypatch.setattr(benchmark, "PARTS", {"fake": "nothing"})
    typed = ["fake", "--times", "2.5", "--repeats", "9", "--output", str(tmp_path)]
    assert script().main(typed) == 0
    (folder,) = tmp_path.iterdir()
    written = json.loads((folder / "benchmark.json").read_text())
    assert written["command"][-len(typed) :] == typed and written["machine"]["versions"]["torch"]
    ours, theirs = written["cases"][0]["contenders"]
    assert ours["ratio"] == 1 and theirs["ratio"] == pytest.approx(2.5, rel=0.15) and len(theirs["seconds"]) == 9
    assert "| theirs |" in (folder / "benchmark.md").read_text()
    assert (folder / "benchmark.png").read_bytes()[:4] == b"\x89PNG"
    assert "the goal is 2: reached" in capsys.readouterr().out
    assert script().main(["fake", "--times", "1", "--repeats", "0", "--output", str(tmp_path)]) == 2


def test_operations_are_those_of_the_matrix_products():
    backbone = load_backbone("vits14", None)
    tokens, blocks, width = 1 + 4, 12, 384
    linears = 2 * tokens * (3 + 1 + 4 + 4) * width**2
    attention = 2 * 2 * tokens**2 * width
    assert operations(backbone, 3, 28) == 3 * (blocks * (linears + attention) + 2 * 4 * 3 * 14**2 * width)


@pytest.mark.slow
def test_the_backbones_part_compares_models_that_are_the_same(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    typed = ["backbone", "--backbones", "vits14", "--repeats", "1", "--batch", "1", "--output", str(tmp_path)]
    assert script().main(typed) == 0
    (folder,) = tmp_path.iterdir()
    for case in json.loads((folder / "benchmark.json").read_text())["cases"]:
        names = [contender["name"] for contender in case["contenders"]]
        assert names[0] == "dense_heads" and {"transformers", "timm", "matrix product"} <= set(names)
