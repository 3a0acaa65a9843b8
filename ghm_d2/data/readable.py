"""One image that cannot be read does not end a training, and many do."""

import logging
from collections.abc import Callable
from typing import Any

import torch

from ghm_d2.errors import UserError, reason

__all__ = ["ReadableMapper", "TooManyUnreadable"]

logger = logging.getLogger(__name__)

Mapper = Callable[[dict[str, Any]], dict[str, Any] | None]

# A share says something once there are a few: of 20 images that failed, where more than a tenth of
# all did, the disk is the likelier cause.
_FEW = 20
_SHARE = 0.1


class TooManyUnreadable(UserError):
    """More images than a few cannot be read."""

    def __init__(self, message: str) -> None:
        """
        Args:
            message: a sentence, or the traceback around it that a DataLoader's worker hands on.
        """
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2])


class ReadableMapper:
    """A mapper around another one, for images that break after the headers were checked.

    In training, an image that cannot be read gives None, for which the loaders of Detectron2 and of
    this project take another one. In a test it becomes a black image, on which nothing will be
    found: the evaluation counts its objects as missed, as long as every image has its place.
    """

    def __init__(self, mapper: Mapper, is_train: bool) -> None:
        """
        Args:
            mapper: from a dataset dict to a sample; whatever it raises is taken for the image's
                fault.
            is_train: whether another image may take its place.
        """
        self._mapper = mapper
        self._is_train = is_train
        self._seen = 0
        self._failed: dict[str, int] = {}

    def __call__(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """
        Returns:
            The sample, or None.

        Raises:
            TooManyUnreadable: more than 20 images failed, and more than a tenth of all, in this
                worker of the loader.
        """
        self._seen += 1
        try:
            return self._mapper(record)
        except UserError:
            raise
        # A damaged file is a random program of its format: it can fail with any exception.
        except Exception as error:
            self._count(record, error)
        return None if self._is_train else self._black(record)

    def _count(self, record: dict[str, Any], error: Exception) -> None:
        name = str(record.get("file_name"))
        self._failed[name] = self._failed.get(name, 0) + 1
        times = sum(self._failed.values())
        if len(self._failed) > _FEW and times > _SHARE * self._seen:
            raise TooManyUnreadable(
                f"{times} of {self._seen} images could not be read, the last {name} "
                f"({reason(error)}): check the disk, or list all of them with ghm-d2 check-data."
            )
        logger.warning(
            "%s cannot be used (%s): %s; %d of %d images so far, in this worker of the loader",
            name,
            reason(error),
            "another one replaces it" if self._is_train else "tested as a black one",
            times,
            self._seen,
        )

    def _black(self, record: dict[str, Any]) -> dict[str, Any]:
        image = torch.zeros(3, int(record["height"]), int(record["width"]), dtype=torch.uint8)
        return {**{k: v for k, v in record.items() if k != "annotations"}, "image": image}
