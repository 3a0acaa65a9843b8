"""The training data as one numbered stream of images, which can be resumed at any batch.

Detectron2's samplers choose the images. Here every image of their stream has a position, images
are grouped by aspect ratio before any of them is loaded, and an augmentation is drawn from (seed,
position). So the k-th batch is the same however many workers load it, and skipping batches costs
nothing but counting.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper, build_detection_train_loader
from detectron2.data.build import _train_loader_from_config
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler

from ghm_d2.errors import command, counted
from ghm_d2.randomness import numpy_state, preserved, seeded, set_numpy_state

from . import workers
from .anchor_check import AnchorSettings, log_anchor_fit
from .augmentation import train_augmentations
from .readable import UnusableData

logger = logging.getLogger(__name__)

Mapper = Callable[[dict[str, Any]], dict[str, Any] | None]

_MOST_REFUSALS = 100  # images that a mapper may refuse in a row before loading fails


def build_test_mapper(cfg: CfgNode) -> DatasetMapper:
    """Detectron2's mapper for evaluation, built without any training data set.

    With keypoints on, Detectron2 would look up in `DATASETS.TRAIN` how to mirror them, although
    evaluation never mirrors an image.
    """
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.KEYPOINT_ON = False
    return DatasetMapper(plain, is_train=False)


def build_train_mapper(cfg: CfgNode) -> DatasetMapper:
    """Detectron2's mapper for training, with what `MODEL.GHM.AUGMENTATIONS` adds.

    Raises:
        UserError: one of them cannot be used.
    """
    if not cfg.MODEL.get("GHM", {}).get("AUGMENTATIONS"):
        return DatasetMapper(cfg, is_train=True)
    return DatasetMapper(
        cfg,
        is_train=True,
        augmentations=train_augmentations(cfg),
        recompute_boxes=cfg.MODEL.MASK_ON,  # the box of a cropped mask may shrink
    )


def build_train_loader(cfg: CfgNode, mapper: Mapper | None = None) -> Iterable[list[dict]]:
    """Like Detectron2's `build_detection_train_loader`, but resuming does not change the batches.

    The images come in Detectron2's order if `DATALOADER.NUM_WORKERS` is 0 or 1, or if
    `DATALOADER.ASPECT_RATIO_GROUPING` is off. Otherwise the orders differ, since Detectron2's
    depends on the number of workers.

    Args:
        cfg: a config with every key that Detectron2's loader reads.
        mapper: from a dataset dict to a sample; None: Detectron2's `DatasetMapper`. Its random
            numbers must come from Python's, NumPy's or PyTorch's global generators.

    Returns:
        A :class:`TrainLoader` or, after a warning, Detectron2's own loader if the data is a
        `torch.utils.data.Dataset` instead of a list.
    """
    # The empty tuple keeps Detectron2 from building a sampler here, which would draw a seed
    # before `TrainLoader` has recorded the state of the generator.
    parts = _train_loader_from_config(cfg, mapper, sampler=())
    records, mapper = parts["dataset"], parts["mapper"]

    def build_sampler() -> Sampler:
        return _train_loader_from_config(cfg, mapper, dataset=records)["sampler"]

    if isinstance(records, list):
        log_anchor_fit(AnchorSettings.of(cfg), records)
    return build_train_loader_from_parts(parts, build_sampler)


def build_train_loader_from_parts(
    parts: dict[str, Any], build_sampler: Callable[[], Sampler]
) -> Iterable[list[dict]]:
    """As :func:`build_train_loader`, from the arguments of `build_detection_train_loader`.

    Args:
        parts: those arguments without `sampler`.
        build_sampler: see :class:`TrainLoader`.
    """
    if not isinstance(parts["dataset"], list):
        logger.warning(
            "the training data is not a list of dataset dicts: a resumed training will not "
            "continue with the images at which it stopped"
        )
        return build_detection_train_loader(**{**parts, "sampler": build_sampler()})
    return TrainLoader(
        parts["dataset"],
        parts["mapper"],
        build_sampler,
        total_batch_size=parts["total_batch_size"],
        aspect_ratio_grouping=parts.get("aspect_ratio_grouping", True),
        num_workers=parts.get("num_workers", 0),
    )


class TrainLoader:
    """Endless batches for one process, each a list of samples; see the module docstring."""

    def __init__(
        self,
        records: list[dict[str, Any]],
        mapper: Mapper,
        build_sampler: Callable[[], Sampler],
        *,
        total_batch_size: int,
        aspect_ratio_grouping: bool,
        num_workers: int,
    ) -> None:
        """
        Args:
            records: dataset dicts.
            mapper: from one of them to a sample.
            build_sampler: builds one of Detectron2's training samplers; whatever seed it needs is
                drawn from NumPy's global generator.
            total_batch_size: images in a batch over all processes.
            aspect_ratio_grouping: whether wide images (width > height) and others never share a
                batch.
            num_workers: processes that load images; 0: this process loads them.
        """
        self._build_sampler = build_sampler
        self._batch_size = total_batch_size // comm.get_world_size()
        self._wide = _wide(records) if aspect_ratio_grouping else None
        self._num_workers = num_workers
        self._skip = 0
        self._draw_seeds()
        logger.info("Making batched data loader with batch_size=%d", self._batch_size)
        self._dataset = _Samples(DatasetFromList(records, copy=False), mapper)

    def _draw_seeds(self) -> None:
        # All processes record the state of the main process, from which their samplers get the
        # seed. With states of their own, `load_state_dict` could draw again in some processes
        # only, which would wait forever for the others.
        self._seeds = comm.all_gather(numpy_state())[0]
        self._sampler = self._build_sampler()
        self._augmentation_seed = comm.shared_random_seed()

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        self._dataset.seed = self._augmentation_seed
        loader = DataLoader(
            self._dataset,
            # Single images, as in Detectron2: workers that load whole batches need more memory.
            sampler=_Stream(self._sampler, self._batch_size, self._wide, self._skip),
            batch_size=None,
            num_workers=self._num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=workers.outlive_signals,
            timeout=workers.TIMEOUT if self._num_workers else 0,
            generator=torch.Generator(),  # else it draws from the global one, as the model does
        )
        samples = iter(loader)
        try:
            while True:
                with workers.watched():
                    batch = list(itertools.islice(samples, self._batch_size))
                yield batch
        finally:
            # Otherwise an exception whose traceback refers to the iterator keeps its workers alive,
            # even after SIGTERM.
            if self._num_workers:
                samples._shutdown_workers()

    def state_dict(self, batches: int) -> dict[str, Any]:
        """
        Args:
            batches: how many batches have been taken from this object.

        Returns:
            What :meth:`load_state_dict` needs to continue after these batches; the same in all
            processes.
        """
        return {
            "batches": self._skip + batches,
            "batch_size": self._batch_size,
            "processes": comm.get_world_size(),
            "images": len(self._dataset),
            "seeds": self._seeds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved state; call it before the first batch is taken.

        Every process must call it, with the same state. If the batch size or the number of
        processes has changed, the stream continues after the same number of images, with a
        warning. If the data has another number of images, the stream starts anew, with a warning.

        Args:
            state: what :meth:`state_dict` returned.
        """
        if state["images"] != len(self._dataset):
            logger.warning(
                "the training data has %d images and had %d when the checkpoint was written: the "
                "order of images starts anew",
                len(self._dataset),
                state["images"],
            )
            return
        seeds = state["seeds"]
        if not (
            seeds["position"] == self._seeds["position"]
            and torch.equal(seeds["words"], self._seeds["words"])
        ):
            with preserved():
                set_numpy_state(seeds)
                self._draw_seeds()
        old = state["processes"], state["batch_size"]
        new = comm.get_world_size(), self._batch_size
        self._skip = state["batches"] * old[0] * old[1] // (new[0] * new[1])
        if old != new:
            texts = (
                f"{counted(p, 'process')} with {counted(n, 'image')} each" for p, n in (old, new)
            )
            logger.warning(
                "the checkpoint was written by %s, this run has %s: it continues after the same "
                "number of images, but in other batches, so this epoch may use a few images twice "
                "and leave a few out",
                *texts,
            )


class _Stream(Sampler):
    """(position, index) of every image, batch after batch, in one process."""

    def __init__(
        self, sampler: Sampler, batch_size: int, wide: np.ndarray | None, skip: int
    ) -> None:
        self._sampler, self._batch_size, self._wide, self._skip = sampler, batch_size, wide, skip

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rank, world = comm.get_rank(), comm.get_world_size()
        skip = self._skip
        buckets: tuple[list, list] = ([], [])
        for number, index in enumerate(self._sampler):
            bucket = buckets[0 if self._wide is None else int(self._wide[index])]
            # Positions are unique over all processes, or they would draw equal augmentations.
            bucket.append((number * world + rank, int(index)))
            if len(bucket) == self._batch_size:
                if skip:
                    skip -= 1
                else:
                    yield from bucket
                bucket.clear()


class _Samples(Dataset):
    """The sample of a (position, index)."""

    seed = 0

    def __init__(self, records: Dataset, mapper: Mapper) -> None:
        self._records, self._mapper = records, mapper

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        position, index = item
        refused: set[int] = set()
        with seeded(self.seed, position):
            while (sample := self._mapper(self._records[index])) is None:
                # As in Detectron2, a mapper may return None, and another image is taken instead.
                refused.add(index)
                if len(refused) >= min(_MOST_REFUSALS, len(self)):
                    self._give_up(len(refused), index)
                logger.warning("the mapper refused image %d: another one replaces it", index)
                while index in refused:
                    index = int(np.random.randint(len(self)))
        return sample

    def _give_up(self, refusals: int, index: int) -> None:
        every = "all" if refusals == len(self) else "too many"
        last = getattr(self._mapper, "last_failure", "") or self._records[index].get("file_name")
        raise UnusableData(
            f"{every} of the {len(self)} images cannot be used, the last {last}: if "
            f"{command('check-data')} can read them all, look at the sizes and augmentations of "
            "the config."
        )


def _as_it_is(sample: dict[str, Any]) -> dict[str, Any]:
    return sample


def _wide(records: list[dict[str, Any]]) -> np.ndarray:
    """Whether each image is wider than it is high, bool (images,)."""
    return np.array([width > height for width, height in map(_size, records)], dtype=bool)


def _size(record: dict[str, Any]) -> tuple[int, int]:
    if "width" in record and "height" in record:
        return record["width"], record["height"]
    with Image.open(record["file_name"]) as image:  # reads the header alone
        turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientation, which Detectron2 applies
        return image.size[::-1] if turned else image.size
