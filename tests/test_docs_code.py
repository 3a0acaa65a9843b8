"""The Python blocks of docs/ run, and do what the pages say of them."""

import re

import pytest
import torch
from detectron2.config import get_cfg

from ghm_d2 import add_ghm_config
from ghm_d2.ablation import load_grid
from ghm_d2.data import register_datasets
from ghm_d2.modeling import GHMRetinaNet
from tests.tiny import RETINANET, ROOT, TINY, unregister_all, write_coco


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)


PAGES = ("own_detector.md", "lazy.md")
BLOCKS = blocks("own_detector.md") + blocks("lazy.md")


def test_every_block_is_run():
    assert [len(blocks(page)) for page in PAGES] == [4, 1]


def run(number):
    names = {}
    exec(compile(BLOCKS[number], f"docs, block {number}", "exec"), names)
    return names


def test_the_detector_of_torchvision():
    names = run(0)
    model = names["model"]
    loss = model.head.classification_head.ghm_c
    assert 0 < names["losses"]["classification"].item() < 100
    anchors = 9 * (64 + 16 + 4 + 1 + 1)
    counted = loss.acc_sum.sum().item() / (1 - loss.momentum)
    # Background counts; some anchors are ignored, with all their classes.
    assert anchors * 3 / 2 < counted <= anchors * 3 and round(counted) % 3 == 0
    conv = model.head.classification_head.conv[0][0]
    assert conv.weight.grad.abs().sum() > 0


def test_the_levels_and_groups(capsys):
    names = run(1)
    detector = names["detector"]
    assert capsys.readouterr().out.startswith("tensor(")
    assert {x: 0 < v.item() < 1000 for x, v in names["losses"].items()} == {
        "loss_cls": True,
        "loss_box_reg": True,
    }
    assert not torch.equal(detector.ghm_c[0].acc_sum, torch.zeros(30))
    assert len(detector.ghm_c) == len(detector.ghm_r) == 2
    # 2 images, one positive with 4 coordinates on each of 2 levels, averaged over 3 steps.
    assert 0 < detector.ghm_r[1].acc_sum.sum() <= 2 * 4


def test_the_box_head():
    assert run(2)["box_predictor"](torch.rand(5, 1024))[0].shape == (5, 4)


def test_the_trainer(tmp_path):
    """Two steps with a shipped config, the second of which moves along a clipped gradient."""
    trainer = run(3)["Trainer"]
    register_datasets([f"doc_trainer={write_coco(tmp_path)}"])
    try:
        cfg = get_cfg()
        add_ghm_config(cfg)
        cfg.merge_from_file(RETINANET)
        cfg.merge_from_list([word for pair in TINY.items() for word in pair])
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("doc_trainer",), ()
        cfg.MODEL.RETINANET.NUM_CLASSES = 3
        cfg.OUTPUT_DIR = str(tmp_path)
        assert cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE == "full_model"
        cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1e-3
        own = trainer(cfg)
        own.train()
    finally:
        unregister_all()
    gradients = [p.grad for p in own.model.parameters() if p.grad is not None]
    assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(1e-3, rel=1e-3)


def test_the_config():
    model = run(4)["model"]
    assert (model._target_, model.ghm_c.bins, model.ghm_r.mu) == (GHMRetinaNet, 30, 0.02)


def test_the_grid_of_comparing_losses(tmp_path):
    """The YAML of docs/ablations.md is a grid, with the sections that follow at its end."""
    text = (ROOT / "docs" / "ablations.md").read_text()
    grid, *more = re.findall(r"```yaml\n(.*?)```", text, re.S)
    file = tmp_path / "mine.yaml"
    file.write_text(grid.replace("/path/to", str(ROOT)) + "".join(more))
    loaded = load_grid(file)
    assert loaded.reference == "focal + SL1" and len(loaded.rows) == 6  # two, each on three copies
    assert loaded.tuning is not None and loaded.tuning.tries == 5
    cfg = get_cfg()
    add_ghm_config(cfg)
    for key, value in loaded.rows[0].overrides.items():
        cfg.merge_from_list([key, value])


def test_every_lazy_config_is_listed():
    text = (ROOT / "docs" / "lazy.md").read_text()
    for config in (ROOT / "configs" / "lazy").glob("*.py"):
        assert f"`{config.name}`" in text
