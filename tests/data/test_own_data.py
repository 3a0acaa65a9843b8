"""The commands of docs/own_data.md run in their order, on a small VOC folder and with two steps."""

import json
import re
import shlex

import pytest

from ghm_d2 import cli
from tests.tiny import ROOT, forget_program
from tests.voc import write_voc

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


def run(command, *more):
    """As the shell would, but in this process."""
    program, name, *words = shlex.split(command)
    assert (program, name) == ("python", "train_net.py") or program == "ghm-d2"
    forget_program()
    cli.main(["train" if program == "python" else name, *words, *more])


def test_from_a_voc_folder_to_predictions(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    write_voc(tmp_path / "my_voc", 6)
    ran = []
    for command in COMMANDS:
        script = command.split()[1]
        ran.append(script)
        if script == "split-data":  # for those who have COCO format
            continue
        if script == "fetch-backbone":  # needs the network
            with pytest.raises(SystemExit) as stop:
                run(f"{command} --help")
            assert stop.value.code == 0
            continue
        trains = script == "train_net.py" and "--eval-only" not in command
        run(command, *(SMALL if trains else ()))
    assert ran == [
        "import-data", "split-data", "look", "fetch-backbone", "train_net.py", "predict", "report",
        "train_net.py", "figures",
    ]  # fmt: skip
    for file in (
        "output/look/my_train_images.png", "output/look/my_val_boxes.png",
        "output/look/my_val_summary.txt", "output/my/model_final.pth",
        "output/my/pictures/predictions.png", "output/my/predicted/img0.png",
        "output/my/predicted/predictions.json", "output/my/report.html",
        "output/my/figures/overview.png",
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
    run(COMMANDS[0])
    (tmp_path / "data" / "my").rename(tmp_path / "old")
    (tmp_path / "old" / "train.json").rename(tmp_path / "annotations.json")
    run(COMMANDS[1])
    assert (tmp_path / "data" / "my" / "val.json").is_file()


@pytest.mark.parametrize("path", re.findall(r"(?:tools|configs)/[\w/]+\.(?:py|yaml)", TEXT))
def test_named_files_exist(path):
    assert (ROOT / path).is_file()
