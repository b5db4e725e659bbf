"""Several runs by `-m`: in this process, as submitit's jobs, as a SLURM job array, on Ray."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dense_heads.__main__ import main
from dense_heads.recompose import read_overrides
from tests.factories import make_ade20k

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = make_ade20k(tmp_path_factory.mktemp("ade"), train=4, val=2)
    return [
        "task=segmentation",
        "task.num_classes=3",
        f"data.root={root}",
        "+task.data.format.masks='annotations/{split}'",
        "task.data.labels.reduce_zero=true",
        "backbone=vitn14_reg",
        "debug=fast",
        "data.image_size=42",
        "data.batch_size=2",
        "trainer.accelerator=cpu",
    ]


def run(arguments, **environment):
    """The command in a process of its own: launchers leave handlers and daemons behind."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), **environment}
    command = [sys.executable, "-m", "dense_heads", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)


def check_jobs(folder, code, said):
    """Of three jobs the second one's value is no number: it fails, the others are whole, and the exit code says so."""
    assert code == 2, said
    assert said.count("dense_heads: optim.lr=fast: expected a number") == 1, said
    for number, lr in ((0, 1e-3), (2, 2e-3)):
        job = folder / str(number)
        assert json.loads((job / "metrics.json").read_text())["steps"] == 2
        assert yaml.safe_load((job / "config.yaml").read_text())["optim"]["lr"] == lr
        kept = read_overrides(job)
        assert kept[-1] == f"optim.lr={lr}" and not any("launcher" in item for item in kept)
        assert (job / "report.html").is_file()
    assert not (folder / "1" / "metrics.json").exists()


def test_multirun_is_hydras_own(tiny, tmp_path, capsys):
    """Every combination of what is typed is a job, in Hydra's own folders."""
    sweep = tmp_path / "sweep"
    assert main(["-m", *tiny, "optim.lr=1e-3,1e-2", "head=linear,linear4", f"hydra.sweep.dir={sweep}"]) == 0
    assert sorted(path.name for path in sweep.iterdir()) == ["0", "1", "2", "3", "multirun.yaml"]
    for number, (lr, head) in enumerate([(1e-3, "linear"), (1e-3, "linear4"), (1e-2, "linear"), (1e-2, "linear4")]):
        config = yaml.safe_load((sweep / str(number) / "config.yaml").read_text())
        assert config["optim"]["lr"] == lr
        assert json.loads((sweep / str(number) / "metrics.json").read_text())["head"]["name"] == head
        assert read_overrides(sweep / str(number))[-2:] == [f"optim.lr={lr}", f"head={head}"]


def test_launcher_options_need_no_m(tiny, tmp_path, capsys):
    sweep = tmp_path / "sweep"
    code = main([*tiny, "launcher=basic", "optim.lr=1e-3,fast,2e-3", f"hydra.sweep.dir={sweep}"])
    check_jobs(sweep, code, capsys.readouterr().err)


def test_submitits_local_executor(tiny, tmp_path):
    pytest.importorskip("submitit")
    sweep = tmp_path / "sweep"
    typed = ["hydra/launcher=submitit_local", "optim.lr=1e-3,fast,2e-3", f"hydra.sweep.dir={sweep}"]
    shown = run(["-m", *tiny, *typed])
    check_jobs(sweep, shown.returncode, shown.stderr)
    assert len(list((sweep / ".submitit").rglob("*_submission.sh"))) + len(list(sweep.rglob("*_result.pkl"))) >= 3


# What a cluster's commands do, on this machine: the array's tasks run side by side, each with its variables.
SBATCH = """#!{python}
import os, re, subprocess, sys
script = sys.argv[-1]
text = open(script).read()
first, last = map(int, re.search(r"#SBATCH --array=(\\d+)-(\\d+)", text).groups())
open({seen!r}, "w").write(text)
for task in range(first, last + 1):
    env = dict(os.environ, SLURM_JOB_ID=str(70 + task), SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID=str(task),
               SLURM_JOB_NUM_NODES="1", SLURM_NTASKS="1", SLURM_NODEID="0", SLURM_PROCID="0", SLURM_LOCALID="0",
               SLURM_JOB_NODELIST="here", SLURM_JOB_NAME="job")
    subprocess.Popen(["bash", script], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job 7")
"""
SRUN = """#!{python}
import os, sys
valued = ("--output", "--error")
at = next(i for i, word in enumerate(sys.argv) if i and word[0] != "-" and sys.argv[i - 1] not in valued)
os.execvp(sys.argv[at], sys.argv[at:])
"""
SACCT = """#!{python}
print("JobID|State|NodeList")
for task in range(3):
    print(f"7_{{task}}|RUNNING|here")
"""


@pytest.mark.slow
def test_a_slurm_job_array(tiny, tmp_path):
    """Through submitit's own SLURM executor; sbatch, srun and sacct are stand-ins."""
    pytest.importorskip("submitit")
    folder, sweep = tmp_path / "bin", tmp_path / "sweep"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("sacct", SACCT)):
        path = folder / name
        path.write_text(text.format(python=sys.executable, seen=str(tmp_path / "script")))
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    typed = ["launcher=slurm", "hydra.launcher.partition=night", "optim.lr=1e-3,fast,2e-3", f"hydra.sweep.dir={sweep}"]
    shown = run([*tiny, *typed], PATH=f"{folder}:{os.environ['PATH']}")
    check_jobs(sweep, shown.returncode, shown.stderr)
    script = (tmp_path / "script").read_text()
    assert re.search(r"#SBATCH --array=0-2%", script) and "--partition=night" in script
    assert "--time=240" in script and "--signal=USR2@120" in script


@pytest.mark.slow
def test_ray(tiny, tmp_path):
    pytest.importorskip("ray")
    sweep = tmp_path / "sweep"
    shown = run([*tiny, "launcher=ray", "optim.lr=1e-3,fast,2e-3", f"hydra.sweep.dir={sweep}"])
    check_jobs(sweep, shown.returncode, shown.stderr)


@pytest.mark.slow
def test_a_job_of_rays_that_dies_leaves_the_others_alone(tiny, tmp_path):
    pytest.importorskip("ray")
    sweep = tmp_path / "sweep"
    mine = tmp_path / "D" / "debug"
    mine.mkdir(parents=True)
    (mine / "dies.yaml").write_text("# @package _global_\ncallbacks: {dies: {_target_: os.abort}}\n")
    typed = ["launcher=ray", "debug=dies,fast", f"hydra.sweep.dir={sweep}"]
    shown = run(["--config-dir", str(mine.parent), *(item for item in tiny if item != "debug=fast"), *typed])
    assert shown.returncode == 2, shown.stdout + shown.stderr
    assert "Job 0" in shown.stderr and "debug=dies" in shown.stderr and "ended without a result" in shown.stderr
    assert json.loads((sweep / "1" / "metrics.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    ("option", "module", "extra"),
    [("launcher=slurm", "submitit", "slurm"), ("launcher=ray", "ray", "ray"), ("mode=sweep", "optuna", "sweep")],
)
def test_without_the_extra_it_says_what_to_install(tmp_path, option, module, extra):
    code = (
        "import sys, importlib.machinery as m\n"
        f"hidden = ('{module}', 'hydra_plugins')\n"
        "find = m.PathFinder.find_spec\n"
        "m.PathFinder.find_spec = classmethod(lambda cls, name, *a: None if name in hidden else find(name, *a))\n"
        "from dense_heads.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, option, "seed=0,1", f"hydra.sweep.dir={tmp_path}"]
    shown = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPO)})
    assert shown.returncode == 2 and f"dense-heads[{extra}]" in shown.stderr, shown.stderr


def test_several_devices_in_a_job_are_refused(tiny, tmp_path, capsys):
    typed = ["launcher=basic", "trainer.devices=2", "seed=0", f"hydra.sweep.dir={tmp_path}"]
    assert main([*tiny, *typed]) == 2
    assert "a launcher that starts the ranks" in capsys.readouterr().err
