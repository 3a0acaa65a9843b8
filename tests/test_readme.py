"""The README's commands run as they stand, but for fewer and smaller steps."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.data.datasets import builtin_meta
from detectron2.engine import DefaultTrainer

from ghm_d2 import cli
from ghm_d2.data import register_datasets
from ghm_d2.engine import main as train
from ghm_d2.modeling import GHMRetinaNet
from tests.tiny import (
    ROOT,
    TINY,
    coco_content,
    forget_program,
    tiny_pairs,
    unregister_all,
    write_coco,
)
from tests.voc import write_lists, write_voc

TEXT = (ROOT / "README.md").read_text()
SHELL = [block.strip() for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)]
PYTHON = re.findall(r"```python\n(.*?)```", TEXT, re.S)
MAKE = [c for c in SHELL if c.startswith("make ")]
TRAIN = [c for c in SHELL if c.startswith("python train_net.py ")]
TOOLS = [c for c in SHELL if c.startswith("ghm-d2 ")]
TABLE = re.search(r"^\| config in .*?\n\n", TEXT, re.S | re.M).group()
COCO_THINGS = [
    {"id": c["id"], "name": c["name"]} for c in builtin_meta.COCO_CATEGORIES if c["isthing"]
]


def run(words, folder):
    """Runs a command in ``folder``; returns its output, or fails with it."""
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder that looks like the checkout, with the data that the README names."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    write_lists(write_voc(folder / "data" / "labelled"), train=["img0", "img1"], val=["img2"])
    coco = folder / "datasets" / "coco"
    for name in ("train2017", "val2017"):
        write_coco(coco, f"instances_{name}", coco_content() | {"categories": COCO_THINGS})
        shutil.copytree(coco / "images", coco / name)
        (coco / "annotations").mkdir(exist_ok=True)
        (coco / f"instances_{name}.json").rename(coco / "annotations" / f"instances_{name}.json")
    return folder


def test_every_shell_command_is_tested():
    assert TRAIN and MAKE and TOOLS and set(SHELL) == {*TRAIN, *MAKE, *TOOLS}


@pytest.mark.parametrize("command", TOOLS, ids=lambda c: c.split()[1])
def test_commands_know_their_options(command, capsys):
    """The commands run in tests of their own; here the README must not name an unknown option."""
    words = shlex.split(command)
    with pytest.raises(SystemExit) as stop:
        cli.main([words[1], "--help"])
    text = capsys.readouterr().out
    options = [word for word in words if word.startswith("--")]
    assert stop.value.code == 0 and [option for option in options if option not in text] == []


def test_train_net_commands_run(checkout, monkeypatch, capsys):
    """In the README's order: the evaluation needs what the training before it wrote."""
    monkeypatch.chdir(checkout)
    pairs = {key: value for key, value in zip(*[iter(tiny_pairs())] * 2, strict=True)}
    for command in TRAIN:
        words = shlex.split(command.replace("--num-gpus 8", "--num-gpus 1"))
        kept = {k: v for k, v in pairs.items() if not (k == "MODEL.WEIGHTS" and k in words)}
        if "small_data" in command:
            # Two for each of the 32 groups: a map of one pixel has no statistics of one channel.
            kept["MODEL.FPN.OUT_CHANNELS"] = "64"
        train([*words[2:], *(word for pair in kept.items() for word in pair)])
        forget_program()
        output = capsys.readouterr().out
        # Two steps on noise find nothing, which Detectron2 reports in a sentence of its own.
        assert "Evaluation results for bbox" in output or "No predictions" in output, output[-2000:]
    assert (checkout / "output" / "model_final.pth").exists()


def test_detectron2s_own_trainer_takes_the_losses(tmp_path, monkeypatch):
    """The lines of "In your Detectron2 code" train a stock config, but for its size."""
    (block,) = PYTHON
    monkeypatch.chdir(tmp_path)
    register_datasets([f"readme_train={write_coco(tmp_path)}"])
    stock = get_cfg()
    stock.merge_from_list([word for pair in TINY.items() for word in pair])
    stock.MODEL.META_ARCHITECTURE = "RetinaNet"
    stock.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    stock.MODEL.RESNETS.OUT_FEATURES = stock.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    stock.MODEL.RETINANET.NUM_CLASSES = 3
    stock.DATASETS.TRAIN, stock.DATASETS.TEST = ("readme_train",), ()
    (tmp_path / "retinanet.yaml").write_text(stock.dump())
    trainers, train = [], DefaultTrainer.train
    monkeypatch.setattr(DefaultTrainer, "train", lambda self: (trainers.append(self), train(self)))
    try:
        exec(block, {"__name__": "__main__"})
    finally:
        unregister_all()
    model = trainers[0].model
    assert type(model) is GHMRetinaNet
    # GHM-R has counted coordinates; GHM-C is switched off by a line of the example.
    assert model.ghm_r is not None and model.ghm_c is None
    assert sum(float(loss.acc_sum.sum()) for loss in model.ghm_r) > 0
    assert (tmp_path / "output" / "model_final.pth").is_file()


@pytest.mark.parametrize("command", MAKE)
def test_make_targets_exist(command):
    assert shutil.which("make")
    run([*shlex.split(command), "--dry-run"], ROOT)


def anchors(page):
    """The anchors of a page's headings, as GitHub and Sphinx make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        path, _, anchor = target.partition("#")
        page = ROOT / (path or "README.md")
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), target


@pytest.mark.parametrize("path", re.findall(r"`(?:configs/)?([\w/*]+\.(?:yaml|py))`", TABLE))
def test_named_configs_exist(path):
    assert list((ROOT / "configs").glob(path))


@pytest.mark.slow
def test_quick_start_whole(tmp_path):
    """The command of the quick start, from a fresh clone to its summary, with the promised AP."""
    run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], tmp_path)
    output = run(["make", "quickstart"], tmp_path / "clone")
    ap50 = float(re.findall(r"AP50[^\d]*([\d.]+)", output)[-1])
    assert ap50 >= 50
    assert Path(tmp_path / "clone" / "output").is_dir()
