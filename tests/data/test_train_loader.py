"""The training data as a numbered stream: Detectron2's order, found again from any batch."""

import logging

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, build_detection_train_loader
from PIL import Image

from ghm_d2.data import check_coco_dataset, parse_dataset, register_coco_dataset
from ghm_d2.data.loader import TrainLoader, build_train_loader
from ghm_d2.randomness import get_random_state
from tests.tiny import SHAPES, unregister_all, write_shapes


@pytest.fixture
def cfg(tmp_path):
    dataset = parse_dataset(f"loaded={write_shapes(tmp_path)}")
    register_coco_dataset(check_coco_dataset(dataset))
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("loaded",)
    cfg.INPUT.MIN_SIZE_TRAIN = (32, 40, 48)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    yield cfg
    unregister_all()


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What the loader has warned of."""
    monkeypatch.setattr(logging.getLogger("ghm_d2"), "propagate", True)
    caplog.set_level(logging.WARNING, "ghm_d2")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "ghm_d2.data.loader"]


def names(batches):
    return [[sample["file_name"] for sample in batch] for batch in batches]


def take(loader, number):
    batches = iter(loader)
    return [next(batches) for _ in range(number)]


def assert_same(left, right):
    assert names(left) == names(right)
    for a, b in zip(sum(left, []), sum(right, []), strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["instances"].gt_boxes.tensor, b["instances"].gt_boxes.tensor)


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_the_order_is_that_of_detectron2(cfg, grouping, sampler):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    found = []
    for build in (build_detection_train_loader, build_train_loader):
        np.random.seed(5)
        found.append(names(take(build(cfg), 20)))
    assert found[0] == found[1]
    assert len({name for batch in found[0] for name in batch}) == len(SHAPES)


@pytest.mark.parametrize("grouping", [True, False])
def test_any_batch_is_found_again(cfg, grouping):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    loader = build_train_loader(cfg)
    whole = take(loader, 12)
    assert len({sample["image"].shape for sample in sum(whole, [])}) > 2
    state = loader.state_dict(5)
    cfg.DATALOADER.NUM_WORKERS = 2
    np.random.seed(99)  # another process draws other seeds
    again = build_train_loader(cfg)
    again.load_state_dict(state)
    rest = take(again, 4)
    assert_same(rest, whole[5:9])
    # and once more from a run that was resumed itself
    np.random.seed(98)
    cfg.DATALOADER.NUM_WORKERS = 0
    third = build_train_loader(cfg)
    third.load_state_dict(again.state_dict(4))
    assert_same(take(third, 3), whole[9:])


def test_an_image_is_augmented_anew_each_time(cfg):
    cfg.INPUT.MIN_SIZE_TRAIN = (32,)  # flips alone
    samples = sum(take(build_train_loader(cfg), 40), [])
    first = [s["image"] for s in samples if s["file_name"].endswith("0.png")]
    flipped = [torch.equal(x, first[0]) for x in first]
    assert 0 < sum(flipped) < len(first)


def test_loading_draws_none_of_the_model_s_random_numbers(cfg):
    batches = iter(build_train_loader(cfg))
    before = get_random_state()
    next(batches)
    after = get_random_state()
    assert torch.equal(before["torch"], after["torch"])
    assert torch.equal(before["python"]["words"], after["python"]["words"])
    assert torch.equal(before["numpy"]["words"], after["numpy"]["words"])
    assert before["numpy"]["position"] == after["numpy"]["position"]


def test_another_batch_size_goes_on_where_as_many_images_are_used(cfg, warnings):
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    loader = build_train_loader(cfg)
    whole = take(loader, 8)
    cfg.SOLVER.IMS_PER_BATCH = 4
    np.random.seed(99)
    again = build_train_loader(cfg)
    again.load_state_dict(loader.state_dict(4))
    assert "1 process with 2 images each, this run has 1 process with 4 images" in warnings()[0]
    assert sum(names(take(again, 2)), []) == sum(names(whole[4:]), [])


def test_other_data_starts_anew(cfg, warnings):
    loader = build_train_loader(cfg)
    start = names(take(loader, 3))
    loader.load_state_dict(loader.state_dict(4) | {"images": 9})
    assert "has 7 images and had 9" in warnings()[0]
    assert names(take(loader, 3)) == start


def test_a_mapper_may_refuse_an_image(cfg, warnings):
    def mapper(record):
        return None if record["image_id"] == 3 else dict(record)

    loader = build_train_loader(cfg, mapper)
    found = take(loader, 20)
    assert {s["image_id"] for s in sum(found, [])} == {1, 2, 4, 5, 6, 7}
    assert "refused image 2" in warnings()[0]
    assert names(take(loader, 20)) == names(found)


def test_sizes_that_the_records_lack_come_from_the_files(cfg, tmp_path):
    records = DatasetCatalog.get("loaded")
    with Image.open(records[0]["file_name"]) as image:  # wide, and turned by its EXIF entry
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(tmp_path / "turned.jpg", exif=exif)
    records[0]["file_name"] = str(tmp_path / "turned.jpg")
    for record in records:
        del record["width"], record["height"]
    DatasetCatalog.register("loaded_bare", lambda: records)
    try:
        cfg.DATASETS.TRAIN = ("loaded_bare",)
        for batch in take(build_train_loader(cfg), 10):
            assert len({sample["width"] > sample["height"] for sample in batch}) == 1
    finally:
        DatasetCatalog.remove("loaded_bare")


def test_a_torch_data_set_is_left_to_detectron2(cfg, warnings):
    records = DatasetCatalog.get("loaded")

    class Records(torch.utils.data.Dataset):
        __len__ = records.__len__

        def __getitem__(self, index):
            return records[index]

    DatasetCatalog.register("loaded_torch", Records)
    try:
        cfg.DATASETS.TRAIN = ("loaded_torch",)
        loader = build_train_loader(cfg)
        assert not isinstance(loader, TrainLoader) and len(take(loader, 1)[0]) == 2
        assert "is not a list of dataset dicts" in warnings()[0]
    finally:
        DatasetCatalog.remove("loaded_torch")
