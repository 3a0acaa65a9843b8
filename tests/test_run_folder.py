"""What a killed training had logged beyond its checkpoint is cut off."""

import json
import logging

import pytest

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
    assert "metrics.json: removed 2 row(s)" in log.text
    assert "gradient_statistics.jsonl: removed 1 row(s)" in log.text


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
    assert "removed 1 row(s)" in log.text


def test_a_writer_that_holds_the_file_goes_on_behind_the_cut(tmp_path):
    file = tmp_path / "metrics.json"
    file.write_text(row(9, total_loss=1.0) + row(19, total_loss=1.0))
    with open(file, "a") as writer:
        RunFolder(tmp_path).cut_logs(10)
        writer.write(row(19, total_loss=2.0))
    assert file.read_text() == row(9, total_loss=1.0) + row(19, total_loss=2.0)
