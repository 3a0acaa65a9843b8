"""GHMTrainer: its optimizer, its evaluators, and the pictures and summary at the end."""

import json

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image

from ghm_d2.data import check_coco_dataset, parse_dataset, register_coco_dataset
from ghm_d2.data.pictures import TILE
from ghm_d2.engine import GHMTrainer, pictures
from ghm_d2.engine.evaluation import AllThresholdsCOCOEvaluator
from ghm_d2.engine.pictures import draw_predictions, plot_training
from ghm_d2.errors import UserError
from ghm_d2.run_folder import RunFolder
from tests.tiny import coco_content, unregister_all, write_coco


@pytest.fixture(autouse=True)
def clean_up():
    yield
    unregister_all()


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    return cfg


@pytest.fixture
def data(tmp_path):
    dataset = check_coco_dataset(parse_dataset(f"trainer_data={write_coco(tmp_path)}"))
    register_coco_dataset(dataset)
    return "trainer_data"


def test_optimizer_clips_the_full_model(cfg):
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0
    model = torch.nn.Linear(1, 1)
    optimizer = GHMTrainer.build_optimizer(cfg, model)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0]]), torch.tensor([4.0])
    optimizer.step()
    assert model.weight.grad.item() == pytest.approx(0.6, rel=1e-5)
    assert model.bias.grad.item() == pytest.approx(0.8, rel=1e-5)


def test_evaluators(cfg, data, tmp_path):
    cfg.DATASETS.TEST = (data,)
    evaluator = GHMTrainer.build_evaluator(cfg, data)
    assert isinstance(evaluator, AllThresholdsCOCOEvaluator)
    assert evaluator._output_dir == str(tmp_path / "out" / "inference")
    cfg.DATASETS.TEST = (data, "another")
    evaluator = GHMTrainer.build_evaluator(cfg, data)
    assert evaluator._output_dir == str(tmp_path / "out" / "inference" / data)
    MetadataCatalog.get("trainer_none").evaluator_type = "sem_seg"
    with pytest.raises(UserError, match="trainer_none cannot be evaluated.*'sem_seg'"):
        GHMTrainer.build_evaluator(cfg, "trainer_none")
    MetadataCatalog.remove("trainer_none")


def test_voc_evaluator(cfg, monkeypatch):
    monkeypatch.setattr(PascalVOCDetectionEvaluator, "__init__", lambda self, name: None)
    evaluator = GHMTrainer.build_evaluator(cfg, "voc_2007_test")
    assert isinstance(evaluator, PascalVOCDetectionEvaluator)


def test_incomplete_annotations_are_evaluated(cfg, tmp_path):
    """Without "area" and "iscrowd" pycocotools fails; the data is converted, and boxes count."""
    content = coco_content()
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    spec = f"trainer_bare={write_coco(tmp_path, 'bare', content)}"
    register_coco_dataset(check_coco_dataset(parse_dataset(spec)))
    evaluator = GHMTrainer.build_evaluator(cfg, "trainer_bare")
    evaluator.reset()
    for record in DatasetCatalog.get("trainer_bare"):
        found = Instances((64, 64))
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]])
        boxes[:, 2:] += boxes[:, :2]
        found.pred_boxes = Boxes(boxes)
        found.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        found.scores = torch.ones(len(boxes))
        evaluator.process([record], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


class Detector(torch.nn.Module):
    """Finds one box of class 1 with score 0.9 and one of class 0 below the threshold."""

    def forward(self, inputs):
        found = Instances((inputs[0]["height"], inputs[0]["width"]))
        found.pred_boxes = Boxes(torch.tensor([[16.0, 16, 48, 48], [2.0, 2, 8, 8]]))
        found.scores = torch.tensor([0.9, 0.1])
        found.pred_classes = torch.tensor([1, 0])
        return [{"instances": found}]


def test_predictions_are_drawn_beside_the_truth(cfg, data, tmp_path):
    for file in (tmp_path / "images").iterdir():
        Image.new("RGB", (64, 64), (90, 90, 90)).save(file)
    cfg.INPUT.MIN_SIZE_TEST = 64
    model = Detector().train()
    mapper = DatasetMapper(cfg, is_train=False)
    draw_predictions(data, mapper, model, tmp_path / "p" / "sheet.png", images=4)
    assert model.training
    sheet = np.asarray(Image.open(tmp_path / "p" / "sheet.png")).astype(int)
    tile, gap, caption = TILE, pictures._GAP, 26
    assert sheet.shape == (2 * (tile + caption + gap), 2 * (2 * tile + 3 * gap), 3)
    scale = tile / 64

    def drawn(half, x, y=30):
        """Whether anything was drawn around the point (x, y), in pixels of the first image."""
        left = gap + half * (tile + gap) + int(x * scale)
        top = caption + int(y * scale)
        patch = sheet[max(top - 4, caption) : top + 4, left - 4 : left + 4]
        return bool((abs(patch - 90) > 20).any())

    # The truth has its sides at x = 8, 32 and 28, 52; the prediction at 16 and 48.
    assert [drawn(0, x) for x in (8, 16, 28, 32, 48, 52)] == [True, False, True, True, False, True]
    assert [drawn(1, x) for x in (8, 16, 28, 32, 48, 52)] == [
        False,
        True,
        False,
        False,
        True,
        False,
    ]
    assert not drawn(1, 2, y=5)  # score 0.1


def write_metrics(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_metrics_of_the_last_run(tmp_path):
    file = tmp_path / "metrics.json"
    rows = [(19, 9.0), (39, 8.0), (59, 7.0), (19, 5.0), (39, 4.0)]
    write_metrics(file, [{"iteration": i, "total_loss": v} for i, v in rows])
    metrics = RunFolder(tmp_path).metrics
    assert {i: row["total_loss"] for i, row in metrics.items()} == {19: 5.0, 39: 4.0}
    write_metrics(file, [{"iteration": i, "total_loss": v} for i, v in [*rows[:3], (59, 6.0)]])
    values = {i: row["total_loss"] for i, row in RunFolder(tmp_path).metrics.items()}
    assert values == {19: 9.0, 39: 8.0, 59: 6.0}


def test_curves_show_losses_and_ap(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = {}
    plot = Axes.plot

    def spy(self, x, y, **kwargs):
        drawn[kwargs["label"]] = (x, y)
        return plot(self, x, y, **kwargs)

    monkeypatch.setattr(Axes, "plot", spy)
    rows = [
        {"iteration": 19, "total_loss": 3.0, "loss_cls": 2.0, "lr": 0.1},
        {"iteration": 39, "total_loss": 2.0, "loss_cls": 1.0, "lr": 0.1, "bbox/AP": 7.0},
        {"iteration": 40, "bbox/AP-disc": 1.0, "bbox/AP50": float("nan")},
    ]
    write_metrics(tmp_path / "metrics.json", rows)
    plot_training(RunFolder(tmp_path).metrics, tmp_path / "deep" / "training.png")
    assert set(drawn) == {"total_loss", "loss_cls", "bbox/AP", "bbox/AP50"}
    assert drawn["loss_cls"] == ((19, 39), (2.0, 1.0))
    assert drawn["bbox/AP"] == ((39,), (7.0,))
    width, height = Image.open(tmp_path / "deep" / "training.png").size
    assert width > height > 300
