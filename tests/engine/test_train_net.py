"""train_net.py as users run it: train, checkpoint, resume, evaluate, and every mistake."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ghm_d2.engine import main
from tests.foreign import Call
from tests.tiny import (
    CLASSES,
    RETINANET,
    ROOT,
    coco_content,
    forget_program,
    one_sentence,
    tiny_pairs,
    write_coco,
)


@pytest.fixture(autouse=True)
def clean_up():
    yield
    forget_program()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {name: f"{name}={write_coco(folder, name)}" for name in ("first", "second")}


@pytest.fixture
def base(tmp_path):
    return ["--config-file", RETINANET, *tiny_pairs(OUTPUT_DIR=tmp_path / "out")]


@pytest.fixture
def fails(capsys):
    """Run main, expect exit code 2 and one sentence on stderr; return the sentence."""

    return lambda argv: one_sentence(main, argv, capsys, "train_net.py")


def metrics(folder):
    lines = (folder / "metrics.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_train_resume_evaluate(tmp_path, base, data, capsys):
    out = tmp_path / "out"
    both = ["--dataset", data["first"], data["second"]]
    main([*base, *both])
    text = capsys.readouterr().out
    assert "Loaded 6 images in COCO format from " + data["first"][6:].split(",")[0] in text
    assert "Trained to iteration 2" in text and str(out / "model_final.pth") in text
    first = torch.load(out / "model_final.pth", weights_only=False)
    assert first["iteration"] == 1
    counts = {k: v for k, v in first["model"].items() if k.endswith("acc_sum")}
    assert counts and all(v.sum() > 0 for v in counts.values())
    assert first["model"]["head.cls_score.weight"].shape[0] == 9 * len(CLASSES)
    results = metrics(out)
    assert any({"bbox/AP", "bbox/AP55", "bbox/AP95"} <= set(row) for row in results)
    assert any("ghm_c/plain_loss" in row for row in results)
    observed = map(json.loads, (out / "gradient_statistics.jsonl").read_text().splitlines())
    assert [(row["iteration"], row["loss"]) for row in observed] == [(1, "ghm_c"), (1, "ghm_r")]
    for name in ("config.yaml", "log.txt", "pictures/predictions.png", "pictures/training.png"):
        assert (out / name).stat().st_size > 0
    predictions = out / "inference" / "coco_instances_results.json"
    trained = json.loads(predictions.read_text())
    assert trained

    # The command that the summary gives, evaluating the same weights: the same boxes.
    predictions.unlink()
    words = text.split("Evaluate it again:\n")[1].split(" train_net.py ")[1].split("\n")[0].split()
    assert "--dataset" in words and data["second"] in words and data["first"] not in words
    main(words)
    assert json.loads(predictions.read_text()) == trained

    main([*base, *both, "--resume", "SOLVER.MAX_ITER", "4"])
    text = capsys.readouterr().out
    assert "Starting training from iteration 2" in text
    second = torch.load(out / "model_final.pth", weights_only=False)
    assert second["iteration"] == 3
    momentum = [
        first["trainer"]["_trainer"]["optimizer"],
        second["trainer"]["_trainer"]["optimizer"],
    ]
    assert momentum[0]["state"] and momentum[0]["state"].keys() == momentum[1]["state"].keys()
    assert [row["iteration"] for row in metrics(out) if "total_loss" in row] == [1, 3]


def test_nothing_to_do_after_the_last_iteration(base, data, fails):
    main([*base, "--dataset", data["first"], "SOLVER.MAX_ITER", "1"])
    error = fails([*base, "--dataset", data["first"], "--resume", "SOLVER.MAX_ITER", "1"])
    assert "1 iterations are done already" in error and "--eval-only --resume" in error


def test_warnings_without_gpu_test_data_and_checkpoint(base, data, tmp_path, capsys, monkeypatch):
    """All three are warned of once, and the training runs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = [*base, "MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", "True", "SOLVER.MAX_ITER", "1"]
    main([*argv, "--resume", "--dataset", data["first"]])
    text = capsys.readouterr().out
    assert text.count("no GPU found, running on the CPU") == 1
    assert text.count("mixed precision (SOLVER.AMP) needs a GPU") == 1
    assert text.count("holds no checkpoint; starting from MODEL.WEIGHTS ''") == 1
    assert text.count("DATASETS.TEST is empty: no evaluation will run") == 1
    assert "give a second --dataset" in text
    assert "no GPU found" in (tmp_path / "out" / "log.txt").read_text()


def run_script(argv, folder):
    words = [sys.executable, str(ROOT / "train_net.py"), *argv]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, env=environment, cwd=folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Detectron2 launches NCCL where GPUs are")
def test_two_processes_on_the_cpu(base, data, tmp_path):
    """Real processes: spawned ones register architectures and data anew."""
    both = ["--dataset", data["first"], data["second"]]
    done = run_script([*base, "--num-gpus", "2", *both], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Trained to iteration 2") == 1
    assert "World size: 2" in done.stdout
    assert any("bbox/AP" in row for row in metrics(tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Detectron2 launches NCCL where GPUs are")
def test_two_processes_report_once(base, data, tmp_path):
    """What only the launched processes can find is one sentence too."""
    main([*base, "--dataset", data["first"]])
    done = run_script([*base, "--num-gpus", "2", "--resume", "--dataset", data["first"]], tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("2 iterations are done already") == 1
    assert "Traceback" not in done.stderr


# --- which data is used for what, seen in the config that a run writes -----------------------


@pytest.fixture
def plan(monkeypatch):
    """The config that main would launch with."""
    seen = []
    monkeypatch.setattr(
        "ghm_d2.engine.run.launch_processes",
        lambda work, processes, command, cfg, datasets: seen.append(cfg),
    )

    def run(argv):
        main([str(word) for word in argv])
        return seen.pop()

    return run


@pytest.mark.parametrize(
    ("words", "train", "test"),
    [
        ([], ("first",), ("second",)),
        (["--eval-only"], None, ("first", "second")),
        (["--eval-only", "DATASETS.TEST", "('second',)"], None, ("second",)),
        (["DATASETS.TRAIN", "('second',)"], ("second",), ("first",)),
        (["DATASETS.TEST", "('first',)"], ("second",), ("first",)),
        (["DATASETS.TRAIN", "('first','second')"], ("first", "second"), ()),
        (["DATASETS.TRAIN", "('first',)", "DATASETS.TEST", "()"], ("first",), ()),
        (
            ["DATASETS.TRAIN", "('first',)", "DATASETS.TEST", "('first',)"],
            ("first",),
            ("first",),
        ),
    ],
    ids=str,
)
def test_splits(base, data, plan, words, train, test):
    weights = ["MODEL.WEIGHTS", ""]
    cfg = plan([*base, "--dataset", data["first"], *words, *weights, "--dataset", data["second"]])
    assert test == cfg.DATASETS.TEST
    assert train is None or train == cfg.DATASETS.TRAIN
    assert cfg.MODEL.RETINANET.NUM_CLASSES == cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3


def test_config_file_that_names_the_data_sets(base, data, plan, tmp_path):
    """As the config.yaml of an earlier run does; one that names others is replaced."""
    both = ["--dataset", data["first"], data["second"]]
    file = tmp_path / "own.yaml"
    text = f'_BASE_: "{RETINANET}"\nDATASETS: {{TRAIN: ["second"], TEST: ["first"]}}\n'
    file.write_text(text)
    cfg = plan([*base, *both, "--config-file", file])
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("second",), ("first",))
    file.write_text(text.replace('TEST: ["first"]', 'TEST: ["coco_2017_val"]'))
    cfg = plan([*base, *both, "--config-file", file])
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("second",), ("first",))


def test_explicit_cpu_is_no_warning(base, data, plan, capsys):
    plan([*base, "--dataset", data["first"]])
    assert "GPU" not in capsys.readouterr().out


def test_unused_data_set_is_a_warning(base, data, plan, capsys):
    words = ["DATASETS.TRAIN", "('first',)", "DATASETS.TEST", "()"]
    plan([*base, *words, "--dataset", data["first"], data["second"]])
    assert "--dataset second is in neither" in capsys.readouterr().out


def test_explicit_class_count_that_agrees(base, data, plan):
    cfg = plan([*base, "--dataset", data["first"], "MODEL.RETINANET.NUM_CLASSES", "3"])
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 3


# --- mistakes: one sentence each ----------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["SOLVER.MAX_ITERS", "3"], "unknown key SOLVER.MAX_ITERS (similar: SOLVER.MAX_ITER"),
        (["MAX_ITER", "3"], "unknown key MAX_ITER (similar: SOLVER.MAX_ITER"),
        (["MODEL", "3"], "unknown key MODEL"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER is of type int"),
        (["DATASETS.TRAIN", "first"], "DATASETS.TRAIN is of type tuple, as in ("),
        (["SOLVER.MAX_ITER"], "one key has no value"),
        (["--nonsense"], "--nonsense"),
        (["--num-gpus", "0"], "--num-gpus and --num-machines must be at least 1"),
        (["--machine-rank", "1"], "--machine-rank must lie in [0, 0] with --num-machines 1, got 1"),
        (["--num-machines", "2"], "needs --dist-url"),
        (["--num-gpus", "2", "SOLVER.IMS_PER_BATCH", "3"], "cannot be divided among 2"),
        (["MODEL.META_ARCHITECTURE", "GHMRetinanet"], "similar: GHMRetinaNet"),
        (["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "global"], "allowed are value, norm, full_model"),
        (["MODEL.GHM.RETINANET.SCOPE", "levels"], "MODEL.GHM.RETINANET.SCOPE"),
        (["MODEL.GHM.RETINANET.CLS.BINS", "0"], "MODEL.GHM.RETINANET.CLS.BINS"),
        (["TEST.AUG.ENABLED", "True"], "TEST.AUG.ENABLED"),
        (["MODEL.WEIGHTS", "gone.pth"], "MODEL.WEIGHTS gone.pth does not exist"),
        (["MODEL.WEIGHTS", "catalog://no/such"], "catalog://no/such cannot be fetched"),
        (["MODEL.WEIGHTS", "a/resnext101_32x4d-a5af3160.pkl"], "ghm-d2 convert-torchvision"),
        (["MODEL.RETINANET.NUM_CLASSES", "80"], "MODEL.RETINANET.NUM_CLASSES 80 contradicts"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "2"], "MODEL.ROI_HEADS.NUM_CLASSES 2 contradicts"),
        (["DATASETS.TEST", "('frist',)"], "there is no data set frist (similar: first"),
        (["DATASETS.TRAIN", "()"], "DATASETS.TRAIN is empty"),
        (["DATASETS.TEST", "('ade20k_sem_seg_val',)"], "ade20k_sem_seg_val"),
        (["OUTPUT_DIR", "/dev/null/out"], "OUTPUT_DIR /dev/null/out cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_on_the_command_line(base, data, fails, words, sentence):
    assert sentence in fails([*base, "--dataset", data["first"], *words])


def test_failing_download(base, data, tmp_path, capsys, monkeypatch):
    """The progress bar of the download stands before the sentence."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as stop:
        main([*base, "--dataset", data["first"], "MODEL.WEIGHTS", "https://127.0.0.1:9/x.pth"])
    assert stop.value.code == 2
    *bar, error = capsys.readouterr().err.splitlines()
    assert "x.pth cannot be fetched" in error and "refused" in error
    assert "Traceback" not in "".join(bar)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "does not exist"),
        ("", "not a valid config"),
        ("just words", "not a valid config"),
        ("MODEL: [unclosed", "not valid YAML"),
        ("MODEL: {DEVICE: !!python/object/apply:os.getcwd []}", "unsafe YAML"),
        ("MODEL: {RETINANETS: {NUM_CLASSES: 3}}", "unknown key MODEL.RETINANETS"),
        ("SOLVER: {MAX_ITER: many}\nVERSION: 2", "SOLVER.MAX_ITER"),
        ("MODEL: 3\nVERSION: 2", "MODEL"),
        ("_BASE_: gone.yaml", "gone.yaml"),
        ("VERSION: 9", "v9"),
    ],
)
def test_mistakes_in_the_config_file(tmp_path, fails, text, sentence):
    file = tmp_path / "own.yaml"
    if text is not None:
        file.write_text(text)
    error = fails(["--config-file", file])
    assert sentence in error and str(file) in error


def test_evaluation_needs_no_segmentations(base, data, plan):
    masks = ["MODEL.MASK_ON", "True", "MODEL.WEIGHTS", ""]
    assert plan([*base, "--eval-only", "--dataset", data["first"], *masks]).MODEL.MASK_ON


def test_mistakes_in_the_data(base, data, fails, tmp_path):
    write_coco(tmp_path, "broken", coco_content() | {"annotations": []})
    paths = f"{tmp_path / 'broken.json'},{tmp_path / 'images'}"
    assert "broken.json holds no annotations" in fails([*base, "--dataset", f"x={paths}"])
    assert "NAME=annotations.json,image_dir" in fails([*base, "--dataset", "x"])
    assert "image folder" in fails([*base, "--dataset", data["first"] + "/gone"])
    twice = ["--dataset", data["first"], data["first"]]
    assert "the same name twice" in fails([*base, *twice])
    write_coco(tmp_path, "other", coco_content(classes=("a", "b", "c")))
    other = f"x={tmp_path / 'other.json'},{tmp_path / 'images'}"
    error = fails([*base, "--dataset", data["first"], other])
    assert "list different categories (disc, bar, cup against a, b, c)" in error


def test_mistakes_with_registered_data(base, data, fails, tmp_path):
    write_coco(tmp_path, "four", coco_content(classes=("a", "b", "c", "d")))
    file, folder = str(tmp_path / "four.json"), str(tmp_path / "images")
    names = ["four", "gone_json", "gone_folder"]
    register_coco_instances("four", {"thing_classes": list("abcd")}, file, folder)
    register_coco_instances("gone_json", {}, str(tmp_path / "gone.json"), folder)
    register_coco_instances("gone_folder", {}, file, str(tmp_path / "gone"))
    try:
        argv = [*base, "DATASETS.TEST", "()", "DATASETS.TRAIN"]
        error = fails([*argv, "('four',)"])
        assert "four has 4 classes but MODEL.RETINANET.NUM_CLASSES is 80" in error
        assert "give MODEL.RETINANET.NUM_CLASSES 4" in error
        error = fails([*argv, "('gone_json',)"])
        assert "gone.json does not exist" in error and "DETECTRON2_DATASETS" in error
        error = fails([*argv, "('gone_folder',)"])
        assert f"{tmp_path / 'gone'} does not exist" in error
        # Three classes on both sides, but others: the counts alone would not tell.
        three = f"x={write_coco(tmp_path, 'three', coco_content(classes=('a', 'b', 'c')))}"
        MetadataCatalog.get("gone_json").thing_classes = list(CLASSES)
        (tmp_path / "gone.json").write_text("{}")
        error = fails([*base, "--dataset", three, "DATASETS.TEST", "('gone_json',)"])
        assert "x and gone_json have different classes" in error
    finally:
        for name in names:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_evaluation_needs_trained_weights(base, data, fails, plan):
    argv = ["--config-file", RETINANET, "--eval-only", "--dataset", data["first"]]
    out = base[base.index("OUTPUT_DIR") :][:2]
    assert "MODEL.WEIGHTS is a pretrained backbone alone" in fails([*argv, *out])
    assert plan([*argv, *out, "MODEL.WEIGHTS", ""]).MODEL.WEIGHTS == ""
    assert "--dataset" in fails([*base, "--eval-only", "DATASETS.TEST", "()"])


def test_weights_that_cannot_be_used(base, data, fails, tmp_path):
    argv = [*base, "--eval-only", "--dataset", data["first"]]
    file = tmp_path / "weights.pth"
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 cut off"):
        file.write_bytes(content)
        assert "weights.pth" in fails([*argv, "MODEL.WEIGHTS", file])
    made = tmp_path / "made"
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Call(os.mkdir, str(made))))
    for words in (argv, [*base, "--dataset", data["first"]]):
        error = fails([*words, "MODEL.WEIGHTS", tmp_path / "evil.pkl"])
        assert f"evil.pkl holds {os.name}.mkdir" in error and not made.exists()
    torch.save({"model": {"head.cls_score.weight": torch.zeros(720, 16, 3, 3)}}, file)
    error = fails([*argv, "MODEL.WEIGHTS", file])
    assert "head.cls_score.weight has the shape (720, 16, 3, 3) instead of (27, 16, 3, 3)" in error
    (tmp_path / "out" / "last_checkpoint").write_text("model_0000009.pth")
    error = fails([*argv, "--resume"])
    assert "no checkpoint in" in error and "model_0000009.pth cannot be read (No such file" in error


def test_expected_results_are_verified(base, data, capsys):
    argv = [*base, "--eval-only", "--dataset", data["first"], "MODEL.WEIGHTS", ""]
    main([*argv, "TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 0.0, 50.0]]"])
    assert "Results verification passed" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*argv, "TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 90.0, 1.0]]"])
    assert stop.value.code == 1
