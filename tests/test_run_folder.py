"""What a training leaves: written whole, read in any state, cut where a resumed one goes on."""

import json
import logging
import math
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghm_d2.errors import UserError
from ghm_d2.run_folder import RunFolder


def row(iteration, **values):
    return json.dumps({"iteration": iteration, **values}) + "\n"


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ghm_d2"), "propagate", True)
    caplog.set_level(logging.INFO, "ghm_d2")
    return caplog


def test_rows_after_the_checkpoint_go(tmp_path, log):
    steps = [row(i, total_loss=1.0) for i in (9, 19, 29, 39)]
    statistics = [row(i, loss="ghm_c") for i in (9, 19, 29)]
    (tmp_path / "metrics.json").write_text("".join(steps))
    (tmp_path / "gradient_statistics.jsonl").write_text("".join(statistics))
    RunFolder(tmp_path).cut_logs(20)
    assert (tmp_path / "metrics.json").read_text() == "".join(steps[:2])
    assert (tmp_path / "gradient_statistics.jsonl").read_text() == "".join(statistics[:2])
    assert "metrics.json: removed 2 rows of iterations" in log.text
    assert "gradient_statistics.jsonl: removed 1 row of iterations" in log.text


def test_the_evaluation_at_the_end_of_a_training_stays(tmp_path, log):
    """Detectron2 counts it as the iteration after the last one: the first of the resumed run."""
    text = row(19, total_loss=1.0) + row(20, **{"bbox/AP": 3.0})
    (tmp_path / "metrics.json").write_text(text)
    RunFolder(tmp_path).cut_logs(20)
    assert (tmp_path / "metrics.json").read_text() == text and not log.text


def test_a_line_that_the_kill_cut_off_goes(tmp_path, log):
    (tmp_path / "metrics.json").write_text(row(9, total_loss=1.0) + '{"iteration": 1')
    RunFolder(tmp_path).cut_logs(20)
    assert (tmp_path / "metrics.json").read_text() == row(9, total_loss=1.0)
    assert "removed 1 row of iterations" in log.text


def test_a_writer_that_holds_the_file_goes_on_behind_the_cut(tmp_path):
    file = tmp_path / "metrics.json"
    file.write_text(row(9, total_loss=1.0) + row(19, total_loss=1.0))
    with open(file, "a") as writer:
        RunFolder(tmp_path).cut_logs(10)
        writer.write(row(19, total_loss=2.0))
    assert file.read_text() == row(9, total_loss=1.0) + row(19, total_loss=2.0)


def test_another_training_leaves_no_row(tmp_path):
    rows = row(0, lr=1.0) + row(19, total_loss=1.0) + row(20, **{"bbox/AP": 3.0})
    (tmp_path / "metrics.json").write_text(rows)
    RunFolder(tmp_path).cut_logs(0)
    assert (tmp_path / "metrics.json").read_text() == ""


# --- writing ------------------------------------------------------------------------------------

RECORD = {
    "config": "SEED: 1\n",
    "config_file": "c.yaml",
    "classes": ("disc", "\ud800"),
    "datasets": {"a": ("a.json", "images")},
    "data": {"a": {"images": 6, "sha256": "00"}},
    "device": "cpu",
    "processes": 1,
}


def test_what_is_written_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    RunFolder(out).write_record(**RECORD)
    RunFolder(out).write_results({"bbox/AP": 71.25, "bbox/APs": math.nan})
    run = RunFolder(out)
    assert run.record.classes == RECORD["classes"] and run.record.data == RECORD["data"]
    assert run.record.datasets == {"a": (tmp_path / "a.json", tmp_path / "images")}
    assert run.record.config_file == str(tmp_path / "c.yaml") and run.config == "SEED: 1\n"
    assert run.record.versions["python"] and run.record.hardware and len(run.record.date) == 10
    assert run.results == {"bbox/AP": 71.25, "bbox/APs": None} and run.notes == []
    assert [file.name for file in out.iterdir() if file.suffix == ".part"] == []


@pytest.mark.parametrize("write", ["write_record", "write_results"])
def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(tmp_path, monkeypatch, write):
    def save():
        arguments = RECORD if write == "write_record" else {"figures": {"bbox/AP": 1.0}}
        getattr(RunFolder(tmp_path), write)(**arguments)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    save()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.json")}
    assert len(before) == 1
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"\.json cannot be written \(No space left on device\)\.$"):
        save()
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


# --- reading ------------------------------------------------------------------------------------

PARTS = {
    "training.json": ("record", "config", "settings"),
    "config.yaml": ("config", "settings"),
    "metrics.json": ("metrics",),
    "gradient_statistics.jsonl": ("statistics",),
    "inference/results.json": ("results",),
    "last_checkpoint": (),
}
NASTY = st.sampled_from(
    [None, True, -1, 0, 5, 10**400, 2.5, math.nan, math.inf, "", "x", "\x1b[31m", "\ud800", [], {}]
)
KEYS = st.sampled_from(
    ["iteration", "total_loss", "time", "bbox/AP", "loss", "calls", "counts", "gradient_share",
     "config", "classes", "datasets", "data", "versions", "hardware", "MODEL", "DATASETS", "TEST",
     "model", "_target_", "train", "max_iter", "SOLVER", "MAX_ITER", "\ud800"]
)  # fmt: skip
VALUES = st.recursive(
    NASTY, lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS, x, max_size=5), max_leaves=12
)
ROWS = st.dictionaries(KEYS, VALUES, max_size=6).map(lambda row: {"iteration": 3} | row)
LINES = st.lists(ROWS | VALUES, max_size=4)
CONTENTS = (
    LINES.map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    | st.dictionaries(KEYS, VALUES, max_size=6).map(lambda x: json.dumps(x).encode())
    | st.sampled_from(
        [b"", b"\xff\xfe", b"[" * 100_000, b'{"config": ' * 20_000, b"a: *a", b"a: &a [*a]",
         b"a: &a [x, x]\n" + b"".join(b"%c: &%c [*%c, *%c, *%c]\n" % (k, k, k - 1, k - 1, k - 1)
                                       for k in range(98, 120)),
         b"x: !!python/object/apply:os.system [false]", b"x: !!int ''", b"? [1]\n: 2",
         b"x: " + b"9" * 5000, b"model: {_target_: !!python/name:torch.nn.Linear ''}"]
    )
    | st.binary(max_size=60)
)  # fmt: skip


@pytest.mark.parametrize("file", PARTS)
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=CONTENTS)
def test_any_content_gives_the_promised_types_or_a_sentence(file, content, tmp_path):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(content)
    run = RunFolder(tmp_path)
    assert all(name.isprintable() for name in run.checkpoints())
    for part in PARTS[file]:
        try:
            value = getattr(run, part)
        except UserError as error:
            assert str(error).count("\n") == 0 and str(error).isprintable(), str(error)
            continue
        if part == "record":
            assert all(isinstance(name, str) for name in value.classes)
            assert all(len(paths) == 2 for paths in value.datasets.values())
        elif part == "settings":
            assert isinstance(value.tree, dict) and isinstance(value.detector, str)
            assert all(isinstance(name, str) for name in value.train + value.test)
            json.dumps(value.tree)  # fails on a tree that contains itself, or an object
        elif part == "metrics":
            assert all(isinstance(x, float) for row in value.values() for x in row.values())
            run.seconds_per_iteration(), run.iterations_done(), run.last("bbox/AP")
        elif part == "statistics":
            for rows in value.values():
                for one in rows.values():
                    lengths = {len(x) for call in one["calls"] for x in call.values()}
                    assert len(lengths) == 1 and 0 not in lengths
        elif part == "results":
            assert all(x is None or math.isfinite(x) for x in value.values())


@pytest.mark.parametrize(
    ("file", "content", "part", "sentence"),
    [
        ("training.json", None, "record", "training.json cannot be read (No such file or dir"),
        ("training.json", b"\xff", "record", "cannot be read (it is not text in UTF-8)"),
        ("training.json", b"[" * 100_000, "record", "is not a complete JSON file (it is nested"),
        ("training.json", b"[]", "record", "is not a complete JSON object"),
        ("config.yaml", b"[1]", "settings", "is damaged (it is not the YAML of a config)"),
        ("config.yaml", b"a: [", "settings", "is damaged (it is not valid YAML: while parsing"),
        ("metrics.json", None, "metrics", "metrics.json cannot be read"),
    ],
)
def test_sentences(file, content, part, sentence, tmp_path):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as error:
        getattr(RunFolder(tmp_path), part)
    assert sentence in str(error.value)


def test_a_damaged_field_is_left_out_and_noted(tmp_path):
    record = {"config": 5, "datasets": {"x": 5}, "classes": ["disc"], "commit": "abc"}
    (tmp_path / "training.json").write_text(json.dumps(record))
    (tmp_path / "config.yaml").write_text("SOLVER: {MAX_ITER: 7}")
    run = RunFolder(tmp_path)
    assert (run.record.classes, run.record.commit, run.record.datasets) == (("disc",), "abc", {})
    assert run.settings.iterations == 7
    assert run.notes == [
        f"training.json: {name} is damaged and left out" for name in ("config", "datasets")
    ]


def test_null_is_no_number_and_damaged_lines_are_counted(tmp_path):
    good = '{"iteration": 1, "bbox/AP": null, "lr": 1}'
    rows = [{"iteration": k, "lr": x} for k, x in enumerate(("x", True, 10**400, [1]), start=2)]
    rows += [None, 5, [], {}, *({"iteration": x} for x in (True, -1, 1.5, 10**400, None, "1"))]
    lines = [good, *map(json.dumps, rows), '{"iteration": 3, "lr']
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    run = RunFolder(tmp_path)
    assert run.metrics.keys() == {1} and run.metrics[1]["lr"] == 1
    assert math.isnan(run.metrics[1]["bbox/AP"])
    assert run.notes == ["metrics.json: 15 damaged lines"]


PYTHON_CONFIG = """\
dataloader:
  test: {dataset: {_target_: detectron2.data.get_detection_dataset_dicts, names: val}}
  train: {dataset: {names: [a, b]}, total_batch_size: 4}
model: {_target_: ghm_d2.modeling.GHMRetinaNet, sizes: !!python/tuple [1, 2]}
train: {max_iter: 12, output_dir: out}
"""


def test_settings_of_both_kinds_of_config(tmp_path):
    (tmp_path / "config.yaml").write_text(PYTHON_CONFIG)
    found = RunFolder(tmp_path).settings
    assert (found.python, found.detector) == (True, "GHMRetinaNet")
    assert (found.train, found.test) == (("a", "b"), ("val",))
    assert (found.iterations, found.images_per_batch) == (12, 4)
    assert found.tree["model"]["sizes"] == [1, 2]
    (tmp_path / "config.yaml").write_text(
        "MODEL: {META_ARCHITECTURE: X}\nDATASETS: {TRAIN: [a], TEST: []}\n"
        "SOLVER: {MAX_ITER: 9, IMS_PER_BATCH: 2}"
    )
    found = RunFolder(tmp_path).settings
    assert (found.python, found.detector, found.train, found.test) == (False, "X", ("a",), ())
    assert (found.iterations, found.images_per_batch) == (9, 2)


def test_places(tmp_path):
    run = RunFolder(tmp_path)
    assert not run.is_training()
    assert run.predictions("a", ["a"]) == tmp_path / "inference" / "coco_instances_results.json"
    assert run.inference("a", ["a", "b"]) == tmp_path / "inference" / "a"
    assert run.last_checkpoint() is None and run.checkpoints() == []
