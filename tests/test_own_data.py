"""The commands of docs/own_data.md run in their order, on a small VOC folder and with two steps."""

import json
import re
import runpy
import shlex
import sys

import pytest
from tiny import ROOT, forget_program
from voc import write_voc

TEXT = (ROOT / "docs" / "own_data.md").read_text()
COMMANDS = [block.strip() for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)]
# Two steps on small images, from random weights: the pretrained ones would have to be downloaded.
SMALL = (
    "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "2", "INPUT.MIN_SIZE_TRAIN",
    "(64,)", "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0", "SEED", "1",
)  # fmt: skip


@pytest.fixture(autouse=True)
def clean_up():
    yield
    forget_program()


def run(command, monkeypatch, *more):
    """As the shell would, with the script in this checkout, but in this process."""
    python, script, *words = shlex.split(command)
    assert python == "python" and (ROOT / script).is_file()
    monkeypatch.setattr(sys, "argv", [script, *words, *more])
    forget_program()
    runpy.run_path(str(ROOT / script), run_name="__main__")


def test_from_a_voc_folder_to_predictions(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    write_voc(tmp_path / "my_voc", 6)
    ran = []
    for command in COMMANDS:
        script = command.split()[1]
        ran.append(script)
        if script == "tools/split_dataset.py":  # for those who have COCO format
            continue
        if script == "tools/fetch_backbone.py":  # needs the network
            with pytest.raises(SystemExit) as stop:
                run(f"{command} --help", monkeypatch)
            assert stop.value.code == 0
            continue
        run(command, monkeypatch, *(SMALL if script == "train_net.py" else ()))
    assert ran == [
        "tools/split_dataset.py", "tools/voc_to_coco.py", "tools/look_at_data.py",
        "tools/fetch_backbone.py", "train_net.py", "tools/predict.py", "tools/report.py",
    ]  # fmt: skip
    for file in (
        "output/look/my_train_images.png", "output/look/my_val_boxes.png",
        "output/look/my_val_summary.txt", "output/my/model_final.pth",
        "output/my/pictures/predictions.png", "output/my/predicted/img0.png",
        "output/my/predicted/predictions.json", "output/my/report.html",
    ):  # fmt: skip
        assert (tmp_path / file).is_file(), file
    record = json.loads((tmp_path / "output" / "my" / "training.json").read_text())
    assert record["datasets"]["my_val"] == [
        str(tmp_path / "data" / "my" / "val.json"),
        str(tmp_path / "my_voc" / "JPEGImages"),
    ]
    page = (tmp_path / "output" / "my" / "report.html").read_text()
    assert "GHMRetinaNet" in page and "2 of 2" in page and "my_val" in page
    assert "anchors of configs/small_data" in capsys.readouterr().out


def test_splitting_a_coco_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_voc(tmp_path / "my_voc", 4)
    run(COMMANDS[1], monkeypatch)
    (tmp_path / "data" / "my").rename(tmp_path / "old")
    (tmp_path / "old" / "train.json").rename(tmp_path / "annotations.json")
    run(COMMANDS[0], monkeypatch)
    assert (tmp_path / "data" / "my" / "val.json").is_file()


@pytest.mark.parametrize("path", re.findall(r"(?:tools|configs)/[\w/]+\.(?:py|yaml)", TEXT))
def test_named_files_exist(path):
    assert (ROOT / path).is_file()
