"""train_net.py with a Python config: train, resume, evaluate, overrides, and every mistake."""

import json
import re
import subprocess
import sys

import pytest
import torch
from detectron2.config import LazyConfig

from ghm_d2.data import check_coco_dataset, parse_dataset, register_coco_dataset
from ghm_d2.engine import GHMTrainer, clipping, main, python_build
from ghm_d2.engine.python_config import load_config
from ghm_d2.errors import UserError
from tests.tiny import PYTHON_CONFIG, ROOT, coco_content, forget_program, one_sentence, write_coco

RETINANET = str(ROOT / "configs" / "lazy" / "ghm_retinanet_R_50.py")


@pytest.fixture(autouse=True)
def clean_up():
    yield
    forget_program()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {name: f"{name}={write_coco(folder, name)}" for name in ("first", "second")}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "tiny.py").write_text(PYTHON_CONFIG)
    return str(tmp_path / "tiny.py")


@pytest.fixture
def base(tmp_path, config):
    return ["--config-file", config, f"train.output_dir={tmp_path}/out"]


@pytest.fixture
def fails(capsys):
    """Run main, expect exit code 2 and one sentence on stderr; return the sentence."""

    return lambda argv: one_sentence(main, argv, capsys, "train_net.py")


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_train_resume_evaluate(tmp_path, base, data, fails, capsys):
    out = tmp_path / "out"
    both = ["--dataset", data["first"], "--dataset", data["second"]]
    main([*base, *both])
    text = capsys.readouterr().out
    for file in ("model_final.pth", "metrics.json", "config.yaml", "pictures/training.png"):
        assert str(out / file) in text and (out / file).exists()
    weights = torch.load(out / "model_final.pth", weights_only=False)
    assert weights["iteration"] == 1
    assert weights["model"]["head.cls_score.bias"].shape == (9 * 3,)  # the classes of the file
    assert weights["model"]["ghm_c.0.acc_sum"].sum() > 0
    assert {row["loss"] for row in rows(out / "gradient_statistics.jsonl")} == {"ghm_c", "ghm_r"}
    assert any("bbox/AP" in row for row in rows(out / "metrics.json"))
    saved = LazyConfig.load(str(out / "config.yaml"))
    assert (saved.train.max_iter, saved.model.num_classes) == (2, 3)
    assert saved.dataloader.train.dataset.names == ["first"]
    assert saved.dataloader.test.dataset.names == ["second"]
    forget_program()

    assert "2 iterations are done already" in fails([*base, *both, "--resume"])
    forget_program()
    main([*base, *both, "--resume", "train.max_iter=3"])
    assert torch.load(out / "model_final.pth", weights_only=False)["iteration"] == 2
    assert "Starting training from iteration 2" in (out / "log.txt").read_text()
    forget_program()

    # All data sets are for testing; each has a folder.
    trained = f"train.init_checkpoint={out}/model_final.pth"
    main([*base, "--eval-only", *both, trained])
    for name in ("first", "second"):
        assert (out / "inference" / name / "coco_instances_results.json").exists()
    forget_program()
    capsys.readouterr()
    other = write_coco(tmp_path, "other", coco_content(classes=("a", "b", "c", "d")))
    error = fails([*base, "--eval-only", "--dataset", f"other={other}", trained])
    assert "the weights do not fit the model: head.cls_score" in error


def test_a_seed_gives_the_same_training_and_the_config_decides_the_clipping(
    tmp_path, config, data, monkeypatch
):
    calls, finals = [], []
    clip = clipping.clip_gradients
    monkeypatch.setattr(
        python_build, "clip_gradients", lambda *args: calls.append(args[1:]) or clip(*args)
    )
    for run, more in (("a", []), ("b", []), ("c", ["train.clip_gradients=null"])):
        out = tmp_path / run
        main(
            ["--config-file", config, f"train.output_dir={out}", "--dataset", data["first"], *more]
        )
        finals.append(torch.load(out / "model_final.pth", weights_only=False)["model"])
        forget_program()
    assert calls == [(35.0, 2.0)] * 2
    assert all(torch.equal(finals[0][k], finals[1][k]) for k in finals[0])


def test_clipping_takes_one_norm_over_all_gradients():
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    clipping.clip_gradients(optimizer, max_norm=1.0, norm_type=2.0)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0]]), torch.tensor([4.0])
    optimizer.step()
    assert model.weight.grad.item() == pytest.approx(0.6, rel=1e-5)
    assert model.bias.grad.item() == pytest.approx(0.8, rel=1e-5)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.max_iter=7", "train.max_iter", 7),
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("model.ghm_r=null", "model.ghm_r", None),
        ("model.ghm_c.bins=10", "model.ghm_c.bins", 10),
        ("model.ghm_c.bias_correction=True", "model.ghm_c.bias_correction", True),  # left out
        ("dataloader.train.mapper.augmentations.0.max_size=9", None, 9),
        ("model.ghm_scope=batch", "model.ghm_scope", "batch"),
    ],
)
def test_overrides(override, key, value):
    cfg = load_config(RETINANET, [override])
    node = cfg
    for part in (key or override.partition("=")[0]).split("."):
        node = node[int(part) if part.isdigit() else part]
    assert node == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_iters=7", r"unknown key train.max_iters \(similar: train.max_iter"),
        ("max_iter=7", r"unknown key max_iter \(similar: train.max_iter"),
        ("train.clip.max_norm=7", r"unknown key train.clip.max_norm \(similar: train.clip_"),
        ("dataloader.train.mapper.augmentations.9.max_size=9", "unknown key dataloader"),
        ("train.max_iter=many", "train.max_iter is of type int, as in 90000: many does not fit"),
        ("train.amp.enabled=1", "train.amp.enabled is of type bool, as in False: 1 does not fit"),
        ("train.max_iter", "train.max_iter is not of the form KEY=VALUE"),
        ("train.output_dir=[a", r"train.output_dir=\[a cannot be understood"),
    ],
)
def test_wrong_overrides_are_named(override, message):
    with pytest.raises(UserError, match=message) as error:
        load_config(RETINANET, [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("model = dict(\n", "cannot be run .*has syntax error"),
        ("import nowhere_at_all\n", "line 1: ModuleNotFoundError: No module named 'nowhere"),
        ("x = 1\ny = x / 0\n", r"tiny.py, line 2: ZeroDivisionError: division by zero\)"),
        ("from .missing import model\n", "line 1: ImportError: Cannot import name missing"),
        ("model = dict()\n", "lacks dataloader, optimizer, lr_multiplier, train"),
    ],
)
def test_a_config_that_cannot_be_run_is_named(config, fails, code, message):
    with open(config, "w") as stream:
        stream.write(code)
    assert re.search(message, fails(["--config-file", config]))


def test_mistakes_are_one_sentence(tmp_path, base, data, config, fails):
    d = ["--dataset", data["first"]]
    assert "does not exist" in fails(["--config-file", "nowhere.py"])
    assert "--config-file" in fails([])
    assert "unrecognized arguments: --evalonly" in fails([*base, "--evalonly"])
    assert "not of the form NAME=" in fails([*base, "--dataset", "first"])
    assert "the same name twice" in fails([*base, *d, *d])
    error = fails([*base, *d, "model.num_classes=4"])
    assert "model.num_classes 4 contradicts" in error and "3 categories" in error
    assert "there is no data set" in fails([*base, "dataloader.train.dataset.names=cocoo"])
    error = fails([*base, *d, "--eval-only"])
    assert "train.init_checkpoint is empty: give train.init_checkpoint=FILE" in error
    error = fails([*base, *d, "train.init_checkpoint=nowhere.pth"])
    assert "train.init_checkpoint nowhere.pth does not exist" in error and "MODEL." not in error
    error = fails([*base, *d, "--num-gpus", "2", "dataloader.train.total_batch_size=3"])
    assert "dataloader.train.total_batch_size 3 cannot be divided" in error
    error = fails([*base, "dataloader.train.dataset.names=[]"])
    assert "give --dataset or dataloader.train.dataset.names=NAME" in error
    assert "num_classes, so the 3 classes" in fails([*base, *d, "model.num_classes=null"])
    error = fails([*base, *d, "model.colour=red"])
    assert "model cannot be built" in error and "colour" in error
    assert "optimizer cannot be built" in fails([*base, *d, "optimizer.betas=1"])
    assert "model cannot be built: bins must be" in fails([*base, *d, "model.ghm_c.bins=0"])


def test_classes_of_a_registered_data_set_must_fit(base, data, fails):
    for text in data.values():
        register_coco_dataset(check_coco_dataset(parse_dataset(text)))
    pairs = [f"dataloader.{split}.dataset.names=first" for split in ("train", "test")]
    error = fails([*base, *pairs])
    assert "has 3 classes but model.num_classes is 80: give model.num_classes=3" in error


@pytest.mark.parametrize(
    ("overrides", "limit"),
    [
        ([], 100),
        (["model.max_detections_per_image=300"], 300),
        (
            ["model.max_detections_per_image=300", "dataloader.evaluator.max_dets_per_image=200"],
            200,
        ),
    ],
)
def test_as_many_detections_count_as_the_model_may_give(config, data, overrides, limit, tmp_path):
    register_coco_dataset(check_coco_dataset(parse_dataset(data["first"])))
    cfg = load_config(config, [f"train.output_dir={tmp_path}", *overrides])
    evaluator = GHMTrainer.build_evaluator(cfg, "first")
    assert evaluator._max_dets_per_image == [1, 10, limit]


def test_more_objects_than_the_model_may_find_are_named(base, data, tmp_path, fails, capsys):
    content = coco_content()
    content["annotations"] = [
        {**content["annotations"][0], "id": k, "bbox": [k % 8, k // 8, 20.0, 20.0]}
        for k in range(1, 9)
    ]
    crowded = f"crowded={write_coco(tmp_path, 'crowded', content)}"
    argv = [*base, "--dataset", data["first"], crowded, "model.max_detections_per_image=5"]
    fails([*argv, "model.ghm_c.bins=0"])
    said = (tmp_path / "out" / "log.txt").read_text()
    assert "has 8 objects, but the detector finds 5 at most" in said
    assert "give model.max_detections_per_image=8" in said


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "use only files from people you trust" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_two_processes_train_and_evaluate(tmp_path, base, data):
    command = [sys.executable, "train_net.py", *base, "--num-gpus", "2"]
    command += ["--dataset", data["first"], "--dataset", data["second"]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bbox/AP" in rows(tmp_path / "out" / "metrics.json")[-1]
    assert "World size: 2" in (tmp_path / "out" / "log.txt").read_text()
