"""Training survives single unreadable images; many of them, or bad annotations, end it."""

import logging
from collections.abc import Callable
from typing import Any

import torch

from ghm_d2.errors import UserError, reason, shown

logger = logging.getLogger(__name__)

Mapper = Callable[[dict[str, Any]], dict[str, Any] | None]

# Training stops once more than `_FEW` different images, and more than `_SHARE` of all that were
# loaded, have failed: the likely cause is then the disk, not the files. `_FEW` keeps it from
# stopping at the first image, whose failure alone would be a share of 100%.
_FEW = 20
_SHARE = 0.1
# Even in days of training, so many failures in a row only happen by chance if most images fail.
_IN_A_ROW = 50


class UnusableData(UserError):
    """A fault of the training data that the checks before the training did not find."""

    def __init__(self, message: str) -> None:
        """
        Args:
            message: a sentence for the user. PyTorch rebuilds the error of a DataLoader's worker
                from its whole traceback, of which only this sentence is kept.
        """
        super().__init__(message.strip().rpartition(f"{type(self).__name__}: ")[2])


class TooManyUnreadable(UnusableData):
    """Too many images cannot be read."""


class ReadableMapper:
    """A mapper around another one, for images that break after the headers were checked.

    In training, an image that cannot be read gives None, and the loaders of Detectron2 and of this
    project take another image instead. In a test it becomes a black image, in which nothing will be
    found, with the reason under "unreadable": if it were left out, the evaluation would not count
    its objects as missed.

    Attributes:
        last_failure: file and reason of the last image that could not be read.
    """

    def __init__(self, mapper: Mapper, is_train: bool) -> None:
        """
        Args:
            mapper: from a dataset dict to a sample. If it also fails on the dict without its
                annotations, the image counts as unreadable.
            is_train: whether an unreadable image gives None; otherwise it gives a black image.
        """
        self._mapper = mapper
        self._is_train = is_train
        self._seen = 0
        self._in_a_row = 0
        self._failed: dict[str, int] = {}
        self.last_failure = ""

    def __call__(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """
        Returns:
            The sample; None for an unreadable image in training.

        Raises:
            TooManyUnreadable: more than 20 images failed, and more than a tenth of all, or 50 one
                after the other, in this worker of the loader.
            UnusableData: the image can be used, but not its annotations.
        """
        self._seen += 1
        try:
            sample = self._mapper(record)
        except UserError:
            raise
        # Not only OSError: a damaged file can make its decoder fail with any exception.
        except Exception as error:
            if self._is_train and self._can_read(record):
                raise UnusableData(
                    f"the annotations of {record.get('file_name')} cannot be used "
                    f"({reason(error)}): correct or remove them."
                ) from error
            self._count(record, error)
        else:
            self._in_a_row = 0
            return sample
        return None if self._is_train else self._black(record)

    def _can_read(self, record: dict[str, Any]) -> bool:
        """Whether the mapper succeeds without the annotations, which are then to blame."""
        if "annotations" not in record:
            return False
        try:
            self._mapper({k: v for k, v in record.items() if k != "annotations"})
        except Exception:
            return False
        return True

    def _count(self, record: dict[str, Any], error: Exception) -> None:
        name = shown(record.get("file_name"))
        self._failed[name] = self._failed.get(name, 0) + 1
        self.last_failure = f"{name} ({reason(error)})"
        self._in_a_row += 1
        times = sum(self._failed.values())
        many = len(self._failed) > _FEW and times > _SHARE * self._seen
        if many or self._in_a_row >= _IN_A_ROW:
            raise TooManyUnreadable(
                f"{times} of {self._seen} images could not be read, the last {self.last_failure}: "
                "check the disk, or list the images with ghm-d2 check-data."
            )
        logger.warning(
            "%s cannot be used (%s): %s (%d of %d images so far in this worker of the loader)",
            name,
            reason(error),
            "another image replaces it" if self._is_train else "a black image replaces it",
            times,
            self._seen,
        )

    def _black(self, record: dict[str, Any]) -> dict[str, Any]:
        image = torch.zeros(3, int(record["height"]), int(record["width"]), dtype=torch.uint8)
        kept = {k: v for k, v in record.items() if k != "annotations"}
        return {**kept, "image": image, "unreadable": self.last_failure}
