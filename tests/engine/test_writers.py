"""Figures in Weights & Biases and MLflow: written without a network, and what misuse says."""

import importlib.util
import json

import pytest
from detectron2.utils.events import EventStorage

from ghm_d2.engine import main
from ghm_d2.engine.writers import MLflowWriter, WandbWriter
from tests.kinds import KINDS, Kind
from tests.tiny import forget_program, one_sentence, write_coco

pytest.importorskip("wandb")
pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def clean_up(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr("detectron2.engine.defaults.collect_env_info", lambda: "")
    yield
    forget_program()


def write(writer):
    """Two rows: a noisy figure and one of an evaluation, each once, whatever is not finite not."""
    with EventStorage() as storage:
        for iteration in range(4):
            storage.iter = iteration
            storage.put_scalar("total_loss", float(iteration))
            if iteration == 1:
                storage.put_scalar("bbox/AP-a,b", 12.5, smoothing_hint=False)
                storage.put_scalar("bbox/APl", float("nan"), smoothing_hint=False)
            if iteration in (1, 3):
                writer.write()
        writer.write()
    writer.close()


def test_wandb_keeps_a_run_without_a_network(tmp_path, monkeypatch):
    sent = []
    writer = WandbWriter(str(tmp_path), "SEED: 1\n")
    log = writer._run.log
    monkeypatch.setattr(writer._run, "log", lambda x, step: (sent.append((step, x)), log(x, step)))
    write(writer)
    assert sent == [(1, {"total_loss": 0.5, "bbox/AP-a,b": 12.5}), (3, {"total_loss": 1.5})]
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_mlflow_keeps_a_run_in_files(tmp_path):
    import mlflow

    write(MLflowWriter(str(tmp_path / "out"), "SEED: 1\n"))
    (run,) = mlflow.search_runs(experiment_names=["ghm_d2"], output_format="list")
    assert run.info.run_name == "out" and run.info.status == "FINISHED"
    assert run.data.metrics == {"total_loss": 1.5, "bbox/AP-a_b": 12.5}
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "total_loss")
    assert [(x.step, x.value) for x in history] == [(1, 0.5), (3, 1.5)]
    assert mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/config.yaml") == "SEED: 1\n"


@pytest.mark.parametrize("name", KINDS)
def test_a_training_writes_to_both(name, tmp_path):
    import mlflow

    kind = Kind(name, tmp_path)
    names = '["wandb","mlflow"]' if kind.python else "('wandb','mlflow')"
    data = f"written={write_coco(tmp_path)}"
    main(kind.argv("--dataset", data, writers=names, output=tmp_path / "out", max_iter=1))
    (run,) = mlflow.search_runs(experiment_names=["ghm_d2"], output_format="list")
    (line,) = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    assert run.data.metrics["total_loss"] == json.loads(line)["total_loss"]
    assert list((tmp_path / "out").glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.parametrize("name", KINDS)
def test_mistakes_are_a_sentence(name, tmp_path, monkeypatch, capsys):
    kind = Kind(name, tmp_path)
    data = ["--dataset", f"written={write_coco(tmp_path)}"]

    def error(writer):
        names = f"[{writer}]" if kind.python else f"('{writer}',)"
        forget_program()
        argv = kind.argv(*data, writers=names, output=tmp_path / "out")
        return one_sentence(main, argv, capsys, "train_net.py")

    assert f"{kind.key('writers')} may hold wandb and mlflow, got 'clearml'" in error("clearml")
    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda n: None if n == "mlflow" else find(n))
        assert "run pip install 'ghm_d2[mlflow]', or leave it out" in error("mlflow")
    import wandb

    def refuse(**options):
        raise wandb.errors.UsageError("api_key not configured")

    monkeypatch.setattr(wandb, "init", refuse)
    said = error("wandb")
    assert "wandb cannot start (UsageError: api_key not configured): log in, set" in said
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "named")  # making one is a line on stderr
    monkeypatch.setattr("mlflow.start_run", lambda **options: 1 / 0)
    said = error("mlflow")
    assert "mlflow cannot start (" in said and "correct MLFLOW_TRACKING_URI, or leave" in said
