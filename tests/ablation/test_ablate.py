"""The ablation command: real runs, killed, resumed and cached; mistakes; submitit's executors."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import submitit
import yaml

from ghm_d2.ablation import job
from ghm_d2.ablation.execute import _Submitter, execute
from ghm_d2.ablation.plan import Run
from ghm_d2.ablation.results import Store, read_study
from ghm_d2.ablation.tuning import next_points
from ghm_d2.cli.ablate import main
from ghm_d2.errors import UserError, exits_with_one_sentence
from tests.kinds import KINDS, Kind
from tests.tiny import RETINANET, ROOT, TINY, forget_program, write_coco

ROWS = [
    {"name": "focal", "overrides": {"MODEL.GHM.RETINANET.CLS.ENABLED": False}},
    {
        "name": "M = 5",
        "overrides": {"MODEL.GHM.RETINANET.CLS.BINS": 5},
        "published": {"AP": 33.4},
        "note": "few regions",
    },
]


@pytest.fixture(autouse=True)
def clean_up():
    yield
    forget_program()


def write_grid(folder, **changes):
    overrides = {k: v for k, v in TINY.items() if k != "SEED"}
    overrides = {k: list(v) if isinstance(v, tuple) else v for k, v in overrides.items()}
    # Untrained, it finds something only at this threshold.
    overrides |= {"SOLVER.MAX_ITER": 20, "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0}
    grid = {
        "title": "Tiny table",
        "config_file": RETINANET,
        "overrides": overrides,
        "reference": "focal",
        "rows": ROWS,
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(grid | changes))
    return file


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return ["--dataset", *(f"{name}={write_coco(folder, name)}" for name in ("first", "second"))]


def wait_for(condition, seconds=600):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)
    return found


def test_interrupted_resumed_cached(tmp_path, data, capsys, monkeypatch):
    """2 rows really train, on wrong classes; Ctrl-C comes in the middle of the first one."""
    grid = write_grid(tmp_path, corrupt={"noisy": {"wrong class": 0.5}})
    out = tmp_path / "out"
    argv = ["--grid", str(grid), "--output", str(out), "--seeds", "2", *data]
    argv += ["--threads", "1"]

    def interrupt():
        wait_for(lambda: next(out.glob("work/*/last_checkpoint"), None))
        os.kill(os.getpid(), signal.SIGINT)

    # A suite that a shell started in the background has inherited "ignore" for SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    signal.signal(signal.SIGINT, before)
    assert stop.value.code == 75 and "interrupted" in capsys.readouterr().err
    pointer = next(out.glob("work/*/last_checkpoint"))
    cut, stopped = pointer.parent.name, pointer.read_text()
    assert stopped != "model_final.pth" and not list(out.glob("runs/*.json"))

    argv += ["--jobs", "2"]
    main(argv)
    text = capsys.readouterr().out
    runs = {p.stem: json.loads(p.read_text()) for p in out.glob("runs/*.json")}
    names = ["focal, noisy", "M = 5, noisy"]
    assert sorted((r["row"], r["seed"]) for r in runs.values()) == [(n, 2) for n in sorted(names)]
    assert {name for r in runs.values() for name in r["data"]["train"]} == {
        "first_wrong_class_50_seed_2"
    }
    assert runs[cut]["starts"] == 2
    logs = [log.read_text() for log in (out / "work" / "logs" / cut).glob("*_log.out")]
    assert len(logs) == 2
    # SIGTERM, not the signal of the terminal: the training has written where it was.
    told = f"{stopped} is written: go on with --resume."
    assert sum(told in log for log in logs) == 1
    assert sum(f"Starting training from iteration {int(stopped[6:13]) + 1}" in x for x in logs) == 1
    one = next(r for r in runs.values() if r["row"] == "M = 5, noisy")
    assert one["config"]["MODEL.GHM.RETINANET.CLS.BINS"] == 5 and one["config"]["SEED"] == 2
    assert one["iterations"] == 20 and one["threads"] == 1
    assert one["seconds_per_iteration"] > 0 and one["peak_rss_mb"] > 100
    assert {"AP", "AP50", "AP-disc", "AP-bar", "AP-cup"} <= one["metrics"].keys()
    assert str(tmp_path) not in json.dumps(one)  # no path of this machine
    evaluated = json.loads((out / "work" / one["id"] / "inference" / "results.json").read_text())
    assert one["metrics"]["AP50"] == pytest.approx(evaluated["bbox/AP50"], abs=1e-4)

    for name in ("tiny.md", "tiny.json", "tiny.png", "tiny.svg"):
        assert (out / name).stat().st_size > 0
    report = (out / "tiny.md").read_text()
    assert report in text and "| M = 5, noisy | 1 | " in report and " | 33.4 |" in report
    assert "1 runs were cut off" in report
    summary = json.loads((out / "tiny.json").read_text())
    assert [row["name"] for row in summary["rows"]] == names
    assert summary["rows"][1]["figures"]["AP50"]["by_seed"] == {
        str(r["seed"]): r["metrics"]["AP50"] for r in runs.values() if r["row"] == "M = 5, noisy"
    }

    # The study's file is enough to know its runs: without their folders, none is started again.
    monkeypatch.delattr(job, "Job")
    assert {one["id"]: one for one in read_study(out / "tiny.json")} == runs
    for name in ("work", "runs"):
        (out / name).rename(tmp_path / name)
    main(argv)
    assert (out / "tiny.md").read_text() == report
    assert "done already: 2 of 2 runs" in capsys.readouterr().out


PYTHON_GRID = {
    "config_file": "tiny.py",
    "overrides": {"model.test_score_thresh": 0.0},
    "rows": [{"name": "focal", "overrides": {"model.ghm_c": None}}],
}


@pytest.mark.parametrize("name", KINDS)
def test_cut_off_in_its_evaluation(tmp_path, data, name):
    """Only the evaluation is done again, with the same result; in this process."""
    out, kind = tmp_path / "out", Kind(name, tmp_path)
    grid = write_grid(tmp_path, **(PYTHON_GRID if kind.python else {"rows": ROWS[:1]}))
    argv = ["--grid", str(grid), "--output", str(out), "--seeds", "1", "--threads", "1", *data]
    argv += [*kind.words(max_iter=2), "--cluster", "debug"]
    main(argv)
    (file,) = out.glob("runs/*.json")
    one = json.loads(file.read_text())
    file.unlink()
    (out / "tiny.json").unlink()
    (out / "work" / one["id"] / "inference" / "results.json").unlink()
    forget_program()
    main(argv)
    again = json.loads(file.read_text())
    assert again["metrics"] == one["metrics"] and again["starts"] == 2
    assert again["seconds_per_iteration"] == one["seconds_per_iteration"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGKILL"])
def test_no_run_is_left_but_after_sigkill(tmp_path, data, how):
    """A terminal's Ctrl-C reaches all processes; SIGKILL leaves the tool no time to stop its runs,
    which go on, as on a cluster, and are found."""
    out = tmp_path / "out"
    words = [sys.executable, "-m", "ghm_d2", "ablate", *data, "--seeds", "1", "--threads", "1"]
    words += ["--grid", str(write_grid(tmp_path, rows=ROWS[:1])), "--output", str(out)]
    words += ["SOLVER.MAX_ITER", "100"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    tool = subprocess.Popen(words, env=environment, start_new_session=True, **streams)
    pointer = wait_for(lambda: next(out.glob("work/*/last_checkpoint"), None))
    (run,) = fake_runs(1, pointer.parent.name)
    store = Store(out)
    process = store.process(run)
    assert process and os.getsid(process) == tool.pid
    if how == "SIGKILL":
        tool.kill()
        tool.wait()
        assert store.process(run) == process
        wait_for(lambda: not store.process(run))
        assert json.loads((store.runs / f"{run.id}.json").read_text())["starts"] == 1
        return
    os.killpg(tool.pid, signal.SIGINT)
    error = tool.communicate()[1]
    assert tool.returncode == 75 and "interrupted" in error and "Traceback" not in error
    assert not store.process(run) and not list(out.glob("runs/*.json"))


def fake_runs(count, name="id"):
    data = {"train": {"a": "1"}, "test": {"b": "2"}}
    names = [f"{name}{i}" for i in range(count)] if name == "id" else [name]
    return [
        Run(one, f"row {i}", 1, ("--config-file", str(i)), {}, {"SEED": 1}, data, {}, 10)
        for i, one in enumerate(names)
    ]


def fake_training(argv):
    """In place of the trainer: --config-file, the run's number, OUTPUT_DIR, folder, ..."""
    number, output = int(argv[1]), Path(argv[3])
    (output / "started").write_text(" ".join([os.environ["OMP_NUM_THREADS"], *argv[4:]]))
    if number == 1:
        with exits_with_one_sentence("train_net.py"):
            raise UserError("the lamp is off.")
    if number == 2:
        raise RuntimeError("the lamp\nis broken")
    if number == 3:
        return  # ends well without an evaluation
    if number == 4:
        sys.exit(75)
    (output / "inference").mkdir()
    (output / "model_0000004.pth").touch()
    (output / "model_final.pth").touch()
    (output / "inference" / "results.json").write_text(json.dumps({"bbox/AP": 40.0 + number}))
    rows = [
        {"total_loss": 2.0, "iteration": i, "time": t} for i, t in ((4, 0.2), (6, 9.0), (9, 0.4))
    ]
    (output / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(job, "main", fake_training)
    monkeypatch.setattr("ghm_d2.ablation.execute._POLL", 0.01)


def test_one_failure_stops_no_other_run(tmp_path, fake, caplog):
    store = Store(tmp_path / "out")
    runs = fake_runs(7)
    outcome = execute(runs, store, jobs=2, threads=3, cluster="debug")
    assert outcome.finished == {"id0", "id5", "id6"}
    results = store.output(runs[3]) / "inference" / "results.json"
    assert outcome.failed == {
        "id1": "the lamp is off.",
        "id2": "RuntimeError: the lamp is broken",
        "id3": f"{results} cannot be read (No such file or directory).",
        "id4": "the training ended with exit code 75",
    }
    assert (
        "row 1, seed 1 not finished" in caplog.text
        and "the lamp is off.; its log is" in caplog.text
    )
    found = store.load(runs[5])
    assert found["metrics"] == {"AP": 45.0} and found["seconds_per_iteration"] == 0.4
    output = store.output(runs[5])
    assert (output / "started").read_text() == "3"
    assert [p.name for p in output.glob("*.pth")] == ["model_final.pth"]

    again = execute(runs, store, jobs=1, threads=1, cluster="debug")
    assert again.cached == outcome.finished and again.failed == outcome.failed
    assert (output / "started").read_text() == "3"  # not run a second time


@pytest.mark.parametrize(
    ("checkpoint", "options"),
    [(None, ""), ("model_0000004.pth", " --resume"), ("model_final.pth", " --resume --eval-only")],
)
def test_goes_on_from_the_last_checkpoint(tmp_path, fake, checkpoint, options):
    store, runs = Store(tmp_path / "out"), fake_runs(1)
    output = store.output(runs[0])
    output.mkdir()
    if checkpoint:
        (output / "last_checkpoint").write_text(checkpoint)
    assert execute(runs, store, 1, 1, cluster="debug").finished == {"id0"}
    assert (output / "started").read_text() == "1" + options


def test_a_run_of_another_default_starts_from_nothing(tmp_path, fake):
    store, runs = Store(tmp_path / "out"), fake_runs(1)
    output = store.output(runs[0])
    output.mkdir()
    (output / "last_checkpoint").write_text("model_0000004.pth")
    older = {"id": "id0", "config": {"SEED": 2}, "weights": {}, "metrics": {"AP": 1.0}}
    (store.runs / "id0.json").write_text(json.dumps(older))
    assert execute(runs, store, 1, 1, cluster="debug").finished == {"id0"}
    assert (output / "started").read_text() == "1" and store.load(runs[0])["metrics"]["AP"] == 40


def test_a_run_of_another_default_is_resumed_too(tmp_path, fake, monkeypatch):
    """What was cut off is not begun anew at each start, though the older result is still there."""
    store, runs = Store(tmp_path / "out"), fake_runs(1)
    older = {"id": "id0", "config": {"SEED": 2}, "weights": {}, "metrics": {"AP": 1.0}}
    (store.runs / "id0.json").write_text(json.dumps(older))
    monkeypatch.setattr(job, "main", lambda argv: sys.exit(75))
    assert execute(runs, store, 1, 1, cluster="debug").failed
    output = store.output(runs[0])
    (output / "last_checkpoint").write_text("model_0000004.pth")
    monkeypatch.setattr(job, "main", fake_training)
    assert execute(runs, store, 1, 1, cluster="debug").finished == {"id0"}
    assert (output / "started").read_text() == "1 --resume"
    assert store.load(runs[0])["starts"] == 2


def test_a_run_at_work_elsewhere_is_left_alone(tmp_path, fake):
    store, runs = Store(tmp_path / "out"), fake_runs(1)
    with store.lock(runs[0]) as free:
        assert free and store.process(runs[0]) == os.getpid()
        assert execute(runs, store, 1, 1, cluster="debug").elsewhere == {"id0"}
    assert not (store.output(runs[0]) / "started").exists() and not store.process(runs[0])
    assert execute(runs, store, 1, 1, cluster="debug").finished == {"id0"}


def local_job(monkeypatch, call):
    """In place of the job: a class made in a function travels by value, so nothing is imported."""

    class Probe:
        def __init__(self, folder, gpus):
            self.gpus = gpus

        def __call__(self, run):
            return call(self, run)

    monkeypatch.setattr(job, "Job", Probe)
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 0)


def test_local_processes_side_by_side(tmp_path, monkeypatch):
    """Each with its threads and its share of the GPUs; one of them is killed."""

    def call(probe, run):
        import os

        if run.seed == 2:
            os.kill(os.getpid(), 9)
        return f"{os.environ['OMP_NUM_THREADS']} thread, GPU {probe.gpus}"

    local_job(monkeypatch, call)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5,6")
    runs = fake_runs(3)
    runs[2] = dataclasses.replace(runs[2], seed=2)
    outcome = execute(runs, Store(tmp_path / "out"), jobs=2, threads=1)
    assert {outcome.failed[f"id{i}"] for i in (0, 1)} == {"1 thread, GPU 4", "1 thread, GPU GPU-5"}
    assert outcome.failed["id2"].startswith("its process ended without a result (killed")


def test_processes_share_the_gpus_out(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    one, two = (_Submitter(Store(tmp_path), 1, number, "local", {}) for number in (1, 2))
    assert [one._gpus(slot) for slot in range(4)] == ["4", "5", "6", "4"]
    assert two._gpus(1) == "6,4"


# The commands of SLURM that submitit calls; a job is a process here.
SLURM = {
    "sbatch": """SLURM_JOB_ID=$$ SLURM_NTASKS=1 SLURM_NNODES=1 SLURM_NODEID=0 SLURM_PROCID=0 \\
        SLURM_LOCALID=0 SLURM_JOB_NODELIST=here bash $1 > /dev/null 2>&1 &
        echo Submitted batch job $$; cp $1 $SLURM_SEEN""",
    "srun": "while [ ${1#-} != $1 ]; do case $1 in --output) shift;; esac; shift; done; exec $@",
    "sacct": "echo 'JobID|State|NodeList'",
    "scancel": "true",
}


def test_the_same_runs_on_slurm(tmp_path, monkeypatch):
    local_job(monkeypatch, lambda probe, run: f"{probe.gpus} {run.id}")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in SLURM.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_SEEN", str(tmp_path / "submitted"))
    more = {"slurm_partition": "gpu", "timeout_min": 90}
    store = Store(tmp_path / "out")
    outcome = execute(fake_runs(2), store, 2, 3, gpus_each=2, cluster="slurm", parameters=more)
    assert outcome.failed == {"id0": "None id0", "id1": "None id1"}  # the cluster chooses the GPUs
    batch = (tmp_path / "submitted").read_text()
    for option in ("partition=gpu", "time=90", "cpus-per-task=3", "gpus-per-node=2"):
        assert f"#SBATCH --{option}\n" in batch


def test_a_requeued_job_keeps_no_failure(tmp_path, monkeypatch):
    """Before its time limit submitit asks for a new job and exits: nothing may catch that."""
    (run,) = fake_runs(1)
    one = job.Job(tmp_path, "4")

    def train(argv):
        again = one.checkpoint(run)
        assert again.args == (run,) and again.function._gpus == "4"
        sys.exit(-1)

    monkeypatch.setattr(job, "main", train)
    with pytest.raises(SystemExit):
        one(run)


def test_failed_runs_end_in_exit_code_1(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(job, "main", lambda argv: sys.exit("no lamp"))
    argv = ["--grid", str(write_grid(tmp_path)), "--output", str(tmp_path / "out"), *data]
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--seeds", "7", "--cluster", "debug"])
    assert stop.value.code == 1
    text = capsys.readouterr().out
    assert "2 of 2 runs failed" in text and "- M = 5, seed 7: no lamp" in text


WEIGHT, RATE = "MODEL.GHM.RETINANET.CLS.LOSS_WEIGHT", "SOLVER.BASE_LR"
TUNED_ROWS = [
    {
        "name": "focal",
        "overrides": {"MODEL.GHM.RETINANET.CLS.LOSS_TYPE": "focal", WEIGHT: 0.25},
    },
    {"name": "M = 5", "overrides": {"MODEL.GHM.RETINANET.CLS.BINS": 5}},
]


def tuned_training(calls, interrupt_at=None):
    """In place of the trainer: best with weight 2 for GHM-C, 0.25 for focal loss, and rate 0.02;
    seed 3 adds 1, and a try with weight 0.5 fails."""

    def train(argv):
        if len(calls) == interrupt_at:
            raise KeyboardInterrupt
        given = dict(zip(argv[2::2], argv[3::2], strict=False))
        weight, rate = float(given.get(WEIGHT, 1)), float(given.get(RATE, 0.01))
        calls.append((given["--dataset"], given["SEED"], weight, rate))
        if weight == 0.5:
            sys.exit("it diverged")
        optimum = 0.25 if "MODEL.GHM.RETINANET.CLS.LOSS_TYPE" in given else 2
        ap = 50 - abs(math.log2(weight / optimum)) - abs(math.log2(rate / 0.02))
        output = Path(given["OUTPUT_DIR"])
        (output / "inference").mkdir()
        ap += given["SEED"] == "3"
        (output / "inference" / "results.json").write_text(json.dumps({"bbox/AP": ap}))
        (output / "metrics.json").write_text('{"total_loss": 1.0, "iteration": 19, "time": 0.1}')

    return train


def test_equal_tries_on_held_out_images(tmp_path, data, monkeypatch, capsys):
    tuning = {"keys": {WEIGHT: 2.0, RATE: 2.0}, "tries": 7, "seeds": [8, 9]}
    grid = write_grid(tmp_path, rows=TUNED_ROWS, tuning=tuning)
    out = tmp_path / "out"
    argv = ["--grid", str(grid), "--output", str(out), "--seeds", "2", "3", *data]
    argv += ["--cluster", "debug"]
    calls = []
    monkeypatch.setattr("ghm_d2.ablation.execute._POLL", 0)
    monkeypatch.setattr(job, "main", tuned_training(calls, interrupt_at=11))
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        main(argv)
    monkeypatch.setattr(job, "main", tuned_training(calls))
    with pytest.raises(SystemExit) as stop:  # for the tries that failed
        main(argv)
    assert stop.value.code == 1
    text = capsys.readouterr().out
    summary = json.loads((out / "tiny.json").read_text())
    record = summary["tuning"]
    for name, chosen in (("focal", (0.25, 0.02)), ("M = 5", (2.0, 0.02))):
        row = record["rows"][name]
        assert row["complete"] and len(row["tries"]) == 7
        assert row["chosen"] == dict(zip((WEIGHT, RATE), chosen, strict=True))
        values = [tuple(one["values"].values()) for one in row["tries"]]
        assert len(set(values)) == 7
        failed = [one["score"] is None for one in row["tries"]]
        assert failed == [value[0] == 0.5 for value in values] and any(failed)
        assert f"| {name} | 7 | " in text and f"| 50.0 | {chosen[0]:g}" in text
        (reported,) = (r for r in summary["rows"] if r["name"] == name)
        assert reported["figures"]["AP"]["by_seed"] == {"2": 50.0, "3": 51.0}
    # Each try once, but for those that failed; what is reported was no try, nor its images.
    tries = [call for call in calls if call[1] in "89"]
    well = [call for call in tries if call[2] != 0.5]
    assert len(set(well)) == len(well)
    parts = [json.loads((out / "work/tuning" / f"{n}.json").read_text()) for n in PARTS]
    names = [{image["file_name"] for image in part["images"]} for part in parts]
    assert all(names) and not names[0] & names[1]
    assert record["images"] == dict(zip(PARTS, map(len, names), strict=True))
    studied = read_study(out / "tiny.json")
    assert len(studied) == len(set(well)) + 4
    assert {tuple(run["data"]["train"]) for run in studied if run["seed"] in (8, 9)} == {
        ("first_rest",)
    }

    # The study is enough to know what has ended by.
    monkeypatch.delattr(job, "Job")
    for name in ("work", "runs"):
        (out / name).rename(tmp_path / name)
    main([*argv, "--report-only"])
    again = json.loads((out / "tiny.json").read_text())
    assert "are not tuned yet" in (out / "tiny.md").read_text()  # what has failed is not in it
    assert again["tuning"]["rows"]["focal"]["tries"][0] == record["rows"]["focal"]["tries"][0]
    assert len(read_study(out / "tiny.json")) == len(studied)


@pytest.mark.parametrize(
    ("tuning", "sentence"),
    [
        ({"keys": {}, "tries": 3}, "keys must map config keys to factors"),
        ({"keys": {WEIGHT: 1.0}, "tries": 3}, "must be above 1, got 1.0"),
        ({"keys": {WEIGHT: 2}, "tries": 1}, "tries must be a whole number >= 2, got 1"),
        ({"keys": {WEIGHT: 2}, "tries": 3, "fraction": 1}, "fraction must lie between 0 and 1"),
        ({"keys": {WEIGHT: 2}, "tries": 3, "seeds": []}, "seeds must be whole numbers"),
        ({"keys": {WEIGHT: 2}, "tries": 3, "seeds": [7]}, "--seeds 7 is a seed that the grid"),
        ({"keys": {"MODEL.RETINANET.NORM": 2}, "tries": 3}, "MODEL.RETINANET.NORM cannot be tuned"),
    ],
)
def test_mistakes_of_a_tuning_are_one_sentence(
    tuning, sentence, tmp_path, data, monkeypatch, capsys
):
    monkeypatch.setattr(job, "main", tuned_training([]))
    grid = write_grid(tmp_path, rows=TUNED_ROWS, tuning=tuning)
    argv = ["--grid", str(grid), "--output", str(tmp_path / "out"), "--seeds", "7", *data]
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--cluster", "debug"])
    assert stop.value.code == 2 and sentence in capsys.readouterr().err


def test_the_nearest_untried_points_come_first():
    assert next_points({}, 2, 1) == [(0, 0)]
    assert next_points({(0, 0): 1.0}, 2, 4) == [(1, 0), (-1, 0), (0, 1), (0, -1)]
    scores = {(0, 0): 1.0, (1, 0): 3.0, (-1, 0): -math.inf}
    assert next_points(scores, 2, 3) == [(2, 0), (1, 1), (1, -1)]
    everything = next_points(scores, 2, 40)
    assert len(set(everything)) == 40 and not set(everything) & set(scores)


PARTS = ("rest", "held_out")


def test_report_only_runs_nothing(tmp_path, data, monkeypatch, capsys):
    monkeypatch.delattr(job, "Job")
    argv = ["--grid", str(write_grid(tmp_path)), "--output", str(tmp_path / "out"), *data]
    main([*argv, "--seeds", "7", "--report-only", "MODEL.WEIGHTS", "not/here.pth"])
    assert "2 not done: focal (seed 7); M = 5 (seed 7)." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--output"),
        (["--grid", "G", "--output", "O", "--seeds", "1", "1"], "must be different numbers"),
        (["--grid", "G", "--output", "O", "--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--grid", "G", "--output", "O", "--cluster", "slurm"], 'Could not detect "srun"'),
        (["--grid", "G", "--output", "O", "--cluster-option", "x"], "must be KEY=VALUE, got x"),
        (
            ["--grid", "G", "--output", "O", "--cluster-option", "colour=3"],
            "Parameter 'colour'",
        ),
        (["--grid", "none.yaml", "--output", "O"], "the grid none.yaml cannot be read"),
        (["--table", "colours", "--output", "O"], "regression"),
        (["--grid", "G", "--output", "O", "SEED", "3"], "SEED is set by this tool: use --seeds"),
        (["--grid", "G", "--output", "O", "SEED"], "one key has no value"),
        (
            ["--grid", "G", "--output", "O", "MODEL.GHM.RETINANET.CLS.BINS", "9"],
            "cannot be set for all runs: it is what row 'M = 5' differs in",
        ),
        (["--grid", "G", "--output", "O", "MODEL.GHM.RETINANET.CLS.BIN", "9"], "similar"),
        (["--grid", "G", "--output", "O", "--config-file", "no.yaml"], "no.yaml does not exist"),
        (["--grid", "G", "--output", "O", "MODEL.WEIGHTS", "no.pth"], "row 'focal': MODEL.WEIGHTS"),
        (["--grid", "G", "--output", "O", "DATASETS.TEST", "()"], "compares evaluations"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, tmp_path, data, capsys):
    places = {"G": str(write_grid(tmp_path)), "O": str(tmp_path / "out")}
    words = [places.get(word, word) for word in words]
    with pytest.raises(SystemExit) as stop:
        main([*words, *data])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("ghm-d2 ablate: error: ") and sentence in error
