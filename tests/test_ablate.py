"""tools/ablate.py: real runs, killed, resumed and cached; mistakes; and the scheduler alone."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml
from tiny import RETINANET, ROOT, TINY, forget_program, write_coco

from ghm_d2.ablation import execute as scheduler
from ghm_d2.ablation import main
from ghm_d2.ablation.execute import execute
from ghm_d2.ablation.plan import Run
from ghm_d2.ablation.results import Store

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
    """2 rows x 2 seeds really train; Ctrl-C comes in the middle of the first one."""
    grid, out = write_grid(tmp_path), tmp_path / "out"
    argv = ["--grid", str(grid), "--output", str(out), "--seeds", "1", "2", *data]
    argv += ["--threads", "1"]

    def interrupt():
        wait_for(lambda: next(out.glob("work/*/last_checkpoint"), None))
        os.kill(os.getpid(), signal.SIGINT)

    # A suite that was started in the background of a shell has inherited "ignore".
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err
    pointer = next(out.glob("work/*/last_checkpoint"))
    cut, stopped = pointer.parent.name, pointer.read_text()
    assert stopped != "model_final.pth" and not list(out.glob("runs/*.json"))

    argv += ["--jobs", "2"]
    main(argv)
    text = capsys.readouterr().out
    runs = {p.stem: json.loads(p.read_text()) for p in out.glob("runs/*.json")}
    assert sorted((r["row"], r["seed"]) for r in runs.values()) == [
        ("M = 5", 1), ("M = 5", 2), ("focal", 1), ("focal", 2)
    ]  # fmt: skip
    assert runs[cut]["starts"] == 2
    log = (out / "work" / cut / "ablate.log").read_text()
    assert f"Starting training from iteration {int(stopped[6:13]) + 1}" in log
    one = next(r for r in runs.values() if r["row"] == "M = 5" and r["seed"] == 2)
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
    assert report in text and "| M = 5 | 2 | " in report and " | 33.4 |" in report
    assert "1 runs were cut off" in report
    summary = json.loads((out / "tiny.json").read_text())
    assert [row["name"] for row in summary["rows"]] == ["focal", "M = 5"]
    assert summary["rows"][1]["figures"]["AP50"]["by_seed"] == {
        str(r["seed"]): r["metrics"]["AP50"] for r in runs.values() if r["row"] == "M = 5"
    }

    # Everything is there: nothing is started, also without the trained models.
    monkeypatch.setattr(scheduler, "CHILD", ("false",))
    for folder in out.glob("work/*/"):
        folder.rename(tmp_path / folder.name)
    main(argv)
    assert (out / "tiny.md").read_text().split("- iterations")[0].startswith("# Tiny table")
    assert "4 runs are done already" in capsys.readouterr().out


@pytest.mark.slow
def test_cut_off_in_its_evaluation(tmp_path, data):
    """Only the evaluation is done again, with the same result."""
    out = tmp_path / "out"
    argv = ["--grid", str(write_grid(tmp_path, rows=ROWS[:1])), "--output", str(out), *data]
    argv += ["--seeds", "1"]
    main(argv)
    (file,) = out.glob("runs/*.json")
    one = json.loads(file.read_text())
    file.unlink()
    (out / "work" / one["id"] / "inference" / "results.json").unlink()
    main(argv)
    again = json.loads(file.read_text())
    assert again["metrics"] == one["metrics"] and again["starts"] == 2
    assert again["seconds_per_iteration"] == one["seconds_per_iteration"]


@pytest.mark.slow
def test_no_run_outlives_the_tool(tmp_path, data):
    """SIGKILL leaves the tool no time to stop its runs: they must notice, and go on later."""
    out = tmp_path / "out"
    words = [sys.executable, str(ROOT / "tools" / "ablate.py"), *data]
    words += ["--grid", str(write_grid(tmp_path)), "--output", str(out), "SOLVER.MAX_ITER", "400"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    tool = subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, **silent)
    pointer = wait_for(lambda: next(out.glob("work/*/last_checkpoint"), None))
    assert not _lock_is_free(out / "work" / f"{pointer.parent.name}.lock")
    tool.kill()
    tool.wait()
    wait_for(lambda: _lock_is_free(out / "work" / f"{pointer.parent.name}.lock"), 10)
    assert pointer.read_text() != "model_final.pth" and not list(out.glob("runs/*.json"))


def _lock_is_free(file):
    with open(file, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def fake_runs(count):
    data = {"train": {"a": "1"}, "test": {"b": "2"}}
    return [
        Run(f"id{i}", f"row {i}", 1, (str(i),), {}, {"SEED": 1}, data, {}, 10) for i in range(count)
    ]


CHILD = """
import json, os, pathlib, sys, time
usage, number, output = pathlib.Path(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[4])
(output / "started").write_text(" ".join([os.environ["OMP_NUM_THREADS"], *sys.argv[5:]]))
if number == 1:
    print("Traceback ...")
    sys.exit("train_net.py: error: the lamp is off.")
if number == 2:
    os.kill(os.getpid(), 9)
if number == 3:
    sys.exit(0)  # has evaluated nothing
(output / "inference").mkdir()
(output / "model_0000004.pth").touch()
(output / "model_final.pth").touch()
(output / "inference" / "results.json").write_text(json.dumps({"bbox/AP": 40.0 + number}))
rows = [{"total_loss": 2.0, "iteration": i, "time": t} for i, t in ((4, 0.2), (6, 9.0), (9, 0.4))]
(output / "metrics.json").write_text("".join(json.dumps(row) + chr(10) for row in rows))
"""


@pytest.fixture
def fake_child(tmp_path, monkeypatch):
    file = tmp_path / "child.py"
    file.write_text(CHILD)
    monkeypatch.setattr(scheduler, "CHILD", (sys.executable, str(file)))
    monkeypatch.setattr(scheduler, "_POLL", 0.01)


def test_one_failure_stops_no_other_run(tmp_path, fake_child, caplog):
    store = Store(tmp_path / "out")
    runs = fake_runs(6)
    outcome = execute(runs, store, jobs=2, threads=3)
    assert outcome.finished == {"id0", "id4", "id5"} and outcome.failed.keys() == {
        "id1", "id2", "id3"
    }  # fmt: skip
    assert outcome.failed["id1"] == "the lamp is off."
    assert outcome.failed["id2"].startswith("signal 9")
    assert "results cannot be read" in outcome.failed["id3"]
    assert "row 1, seed 1 failed" in caplog.text and "the lamp is off." in caplog.text
    found = store.load(runs[4])
    assert found["metrics"] == {"AP": 44.0} and found["seconds_per_iteration"] == 0.4
    output = store.output(runs[4])
    assert (output / "started").read_text() == "3"
    assert [p.name for p in output.glob("*.pth")] == ["model_final.pth"]

    again = execute(runs, store, jobs=1, threads=1)
    assert again.cached == outcome.finished and again.failed.keys() == outcome.failed.keys()
    assert (output / "started").read_text() == "3"  # not run a second time


@pytest.mark.parametrize(
    ("checkpoint", "options"),
    [(None, ""), ("model_0000004.pth", " --resume"), ("model_final.pth", " --resume --eval-only")],
)
def test_goes_on_from_the_last_checkpoint(tmp_path, fake_child, checkpoint, options):
    store, runs = Store(tmp_path / "out"), fake_runs(1)
    output = store.output(runs[0])
    output.mkdir()
    if checkpoint:
        (output / "last_checkpoint").write_text(checkpoint)
    assert execute(runs, store, 1, 1).finished == {"id0"}
    assert (output / "started").read_text() == "1" + options


def test_a_run_at_work_elsewhere_is_left_alone(tmp_path, fake_child):
    store, runs = Store(tmp_path / "out"), fake_runs(1)
    with open(store.work / "id0.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert execute(runs, store, 1, 1).elsewhere == {"id0"}
    assert not (store.output(runs[0]) / "started").exists()
    assert execute(runs, store, 1, 1).finished == {"id0"}


def test_processes_share_the_gpus_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    seen = [scheduler._environment(slot, 1, 1)["CUDA_VISIBLE_DEVICES"] for slot in range(4)]
    assert seen == ["4", "5", "6", "4"]
    assert scheduler._environment(1, 1, 2)["CUDA_VISIBLE_DEVICES"] == "6,4"


def test_failed_runs_end_in_exit_code_1(tmp_path, data, fake_child, monkeypatch, capsys):
    monkeypatch.setattr(scheduler, "CHILD", (sys.executable, "-c", "exit('no lamp')"))
    argv = ["--grid", str(write_grid(tmp_path)), "--output", str(tmp_path / "out"), *data]
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--seeds", "7"])
    assert stop.value.code == 1
    text = capsys.readouterr().out
    assert "2 of 2 runs failed" in text and "- M = 5, seed 7: no lamp" in text


def test_report_only_runs_nothing(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(scheduler, "CHILD", ("false",))
    argv = ["--grid", str(write_grid(tmp_path)), "--output", str(tmp_path / "out"), *data]
    main([*argv, "--seeds", "7", "--report-only", "MODEL.WEIGHTS", "not/here.pth"])
    assert "2 not done: focal (seed 7); M = 5 (seed 7)." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "--output"),
        (["--grid", "G", "--output", "O", "--seeds", "1", "1"], "must be different numbers"),
        (["--grid", "G", "--output", "O", "--jobs", "0"], "--jobs must be at least 1, got 0"),
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
    assert error.startswith("ablate.py: error: ") and sentence in error
