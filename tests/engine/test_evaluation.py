"""AP at every IoU threshold, against pycocotools."""

import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from pycocotools.cocoeval import COCOeval

from ghm_d2.data import check_coco_dataset, parse_dataset, register_coco_dataset
from ghm_d2.engine import evaluation
from ghm_d2.engine.evaluation import (
    AllThresholdsCOCOEvaluator,
    costs_recorded,
    score_thresholds,
)
from ghm_d2.run_folder import SECONDS_PER_IMAGE
from tests.tiny import coco_content, unregister_all, write_coco

NAMES = [f"AP{threshold}" for threshold in range(50, 100, 5)]
IMAGES = 12


@pytest.fixture
def dataset(tmp_path):
    """Twelve images with two boxes each; "none" is a class without objects."""
    content = coco_content(IMAGES)
    content["categories"].append({"id": 9, "name": "none"})
    place = write_coco(tmp_path, content=content, images=IMAGES)
    register_coco_dataset(check_coco_dataset(parse_dataset(f"evaluated={place}")))
    DatasetCatalog.get("evaluated")  # loading notes which class has which id
    yield content
    unregister_all()


def evaluated(kind, folder, content, *, found=True, noise=2.0, seed=3):
    """The evaluator and its results for detections that are off by up to a few pixels."""
    random = np.random.default_rng(seed)
    evaluator = kind("evaluated", output_dir=str(folder), allow_cached_coco=False)
    evaluator.reset()
    for image in content["images"]:
        truth = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = torch.tensor([a["bbox"] for a in truth])
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
        boxes = boxes + torch.tensor(random.normal(0, noise, boxes.shape)).float()
        instances = Instances((64, 64))
        instances.pred_boxes = Boxes(boxes if found else boxes[:0])
        instances.scores = torch.tensor(random.random(len(boxes)))[: len(boxes) if found else 0]
        classes = torch.tensor([a["category_id"] - 1 for a in truth])
        instances.pred_classes = classes if found else classes[:0]
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    evaluator.results = evaluator.evaluate()
    return evaluator, evaluator.results["bbox"]


def test_each_threshold_is_what_pycocotools_gives_for_it_alone(tmp_path, dataset):
    evaluator, results = evaluated(AllThresholdsCOCOEvaluator, tmp_path, dataset)
    truth = evaluator._coco_api
    found = truth.loadRes(str(tmp_path / "coco_instances_results.json"))
    for name in NAMES:
        alone = COCOeval(truth, found, "bbox")
        alone.params.iouThrs = np.array([int(name[2:]) / 100])
        alone.evaluate()
        alone.accumulate()
        precision = alone.eval["precision"][0, :, :, 0, 2]
        assert results[name] == pytest.approx(precision[precision > -1].mean() * 100)
    values = [results[name] for name in NAMES]
    assert values == sorted(values, reverse=True) and values[0] > values[-1] + 20
    assert np.mean(values) == pytest.approx(results["AP"])


def test_detectron2s_own_figures_stay_as_they_are(tmp_path, dataset):
    _, ours = evaluated(AllThresholdsCOCOEvaluator, tmp_path / "a", dataset)
    _, stock = evaluated(COCOEvaluator, tmp_path / "b", dataset)
    assert stock["AP50"] > stock["AP75"] > 0
    for name, value in stock.items():
        assert ours[name] == pytest.approx(value, nan_ok=True)
    standard = [name for name in stock if "-" not in name]
    classes = [name for name in stock if "-" in name]
    assert classes == ["AP-disc", "AP-bar", "AP-cup", "AP-none"]
    more = [name for name in NAMES if name not in standard]
    assert list(ours) == standard + more + classes


def test_nothing_found_is_nan_at_each_threshold(tmp_path, dataset):
    _, results = evaluated(AllThresholdsCOCOEvaluator, tmp_path, dataset, found=False)
    assert set(NAMES) <= set(results)
    assert all(math.isnan(value) for value in results.values())


def exact(truth, found, category=None):
    """Score to F1 by counting COCO's matches at IoU 0.5, of one class or of all."""
    result = COCOeval(truth, found, "bbox")
    result.evaluate()
    calls = [
        c for c in result.evalImgs
        if c and c["aRng"] == result.params.areaRng[0] and category in (None, c["category_id"])
    ]  # fmt: skip
    objects = sum(len(c["gtIds"]) for c in calls)
    scores = np.concatenate([c["dtScores"] for c in calls])
    hits = np.concatenate([c["dtMatches"][0] > 0 for c in calls])
    return {
        s: (2 * hits[scores >= s].sum() / ((scores >= s).sum() + objects), scores, hits, objects)
        for s in scores
    }


@pytest.mark.parametrize("seed", range(3))
def test_the_score_threshold_gives_the_best_f1(tmp_path, dataset, seed):
    """Of each class and of all together: with so few objects, each has its point."""
    evaluator, _ = evaluated(AllThresholdsCOCOEvaluator, tmp_path, dataset, noise=6.0, seed=seed)
    best, truth = evaluator.results["best_f1"], evaluator._coco_api
    found = truth.loadRes(str(tmp_path / "coco_instances_results.json"))
    for category, name in ((1, "disc"), (2, "bar"), (3, "cup")):
        f1 = exact(truth, found, category)
        largest = max(value[0] for value in f1.values())
        assert best[f"F1-{name}"] == pytest.approx(100 * largest)
        assert f1[best[f"score_threshold-{name}"]][0] == pytest.approx(largest)
    f1 = exact(truth, found)
    largest = max(value[0] for value in f1.values())
    value, scores, hits, objects = f1[best["score_threshold"]]
    assert 0.4 < value < 0.98 and value == pytest.approx(largest)
    assert best["F1"] == pytest.approx(100 * value)
    kept = scores >= best["score_threshold"]
    assert best["recall"] == pytest.approx(100 * hits[kept].sum() / objects)
    assert best["precision"] == pytest.approx(100 * hits[kept].mean())
    assert math.isnan(best["score_threshold-none"]) and math.isnan(best["F1-none"])


def test_thresholds_among_the_results(tmp_path, dataset):
    evaluator, _ = evaluated(AllThresholdsCOCOEvaluator, tmp_path, dataset)
    results = evaluator.results
    found = score_thresholds(results, ["evaluated"])
    assert list(found) == ["", "disc", "bar", "cup"]  # "none" has no number
    assert found[""] == results["best_f1"]["score_threshold"]
    assert score_thresholds({"a": {}, "b": results}, ["b", "a"]) == found
    assert score_thresholds({"a": {}, "b": results}, ["a", "b"]) == {}
    assert score_thresholds(None, ()) == score_thresholds({}, ["a"]) == {}
    evaluator, _ = evaluated(AllThresholdsCOCOEvaluator, tmp_path, dataset, found=False)
    assert "best_f1" not in evaluator.results


def test_the_log_shows_each_threshold(tmp_path, dataset, caplog):
    evaluator = AllThresholdsCOCOEvaluator("evaluated", output_dir=str(tmp_path))
    evaluator._logger.propagate = True
    with caplog.at_level("INFO"):
        _, results = evaluated(AllThresholdsCOCOEvaluator, tmp_path, dataset)
    text = caplog.text.split("AP at each IoU threshold")[1]
    assert all(name in text for name in NAMES)
    assert f"{results['AP55']:.3f}" in text


def test_costs_of_an_evaluation_in_a_training_are_recorded(monkeypatch):
    """The median over the calls, without the time between them; nothing outside a training."""
    now = [0.0]

    class Slow(torch.nn.Module):
        def forward(self, seconds):
            now[0] += seconds

    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: now[0])
    model = Slow()
    with EventStorage(7) as storage:
        with costs_recorded(model) as timed:
            for seconds in (0.5, 0.25, 0.25):
                timed(seconds)
                now[0] += 9
        ((value, iteration),) = storage.latest().values()
    assert (value, iteration) == (0.25, 7)
    assert list(storage.latest()) == [SECONDS_PER_IMAGE]  # no memory without a GPU
    with costs_recorded(model) as timed:
        timed(0.0)
