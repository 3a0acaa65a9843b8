"""Detectron2's checkpointer behind the restricted unpickler."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from fvcore.common.checkpoint import (
    Checkpointer,
    get_missing_parameters_message,
    get_unexpected_parameters_message,
)

from ghm_d2.errors import UserError, described, reason, shown
from ghm_d2.files import whole_file
from ghm_d2.losses.weighted import WeightedLoss
from ghm_d2.run_folder import LAST_CHECKPOINT, RunFolder
from ghm_d2.run_parts import Record

from .files import check_name, write_checkpoint
from .opening import load_file
from .origin import ORIGIN, read_origin, with_thresholds

logger = logging.getLogger(__name__)

# What restoring an optimizer, a schedule or a hook from wrong values can raise.
_DAMAGED = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

_WAY_OUT = (
    "if it comes from torchvision or mmdetection, convert it with ghm-d2 convert-torchvision "
    "or ghm-d2 convert-mmdet."
)


def _mapping(data: Any, file: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        kind = type(data).__name__
        raise UserError(f"{file} holds a {kind} instead of tensors by their names: {_WAY_OUT}")
    return data


def _check_tensors(model: dict[str, Any], file: str) -> None:
    for name, value in model.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor | np.ndarray)):
            what = f"{shown(name, 80)} ({type(value).__name__})"
            raise UserError(f"{file} holds {what} among the tensors of the model: {_WAY_OUT}")
        check_name(name)


class _RestrictedTorchLoad(Checkpointer):
    """Loads for `DetectionCheckpointer` the files that are neither .pkl nor .pyth."""

    trusted = False  # whether files may run code; an instance sets it
    _opened: tuple[str, dict[str, Any]] | None = None  # path and content, until it is loaded

    def _open(self, file: str) -> dict[str, Any]:
        """The content of a file; one that `_open_newest` has just read is not read again."""
        opened, self._opened = self._opened, None
        if opened is not None and opened[0] == file:
            return opened[1]
        return _mapping(load_file(file, trusted=self.trusted), file)

    def _load_file(self, f: str) -> dict[str, Any]:
        return self._open(f)


def _reset_counts(model: torch.nn.Module, path: str) -> None:
    losses = [module for module in model.modules() if isinstance(module, WeightedLoss)]
    counted = [loss for loss in losses if any((x > 0).any() for x in loss.state_dict().values())]
    for loss in losses:
        loss.reset_parameters()
    if counted:
        logger.info(
            "the running counts of %d losses start at 0: those in %s belong to "
            "the training it comes from",
            len(counted),
            path,
        )


class RestrictedCheckpointer(DetectionCheckpointer, _RestrictedTorchLoad):
    """`DetectionCheckpointer` that refuses files with code, and files none of whose weights fit.

    It takes what Detectron2's takes: Detectron2's and Detectron1's .pkl, pycls' .pyth, and .pth.
    A file that is refused raises :class:`~ghm_d2.errors.UserError`. A checkpoint appears under its
    name only when it is complete, so a process that is killed leaves no damaged one behind.
    """

    _filename = "the checkpoint"  # for messages
    _resumes = False
    _starts = True  # whether layers that the file lacks may keep their initial weights
    origin_entry: dict[str, Any] | None = None  # to save; an instance sets it
    saved_model: torch.nn.Module | None = None  # whose weights are saved in place of the model's
    origin = Record()  # of what was loaded last

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Detectron2's; to resume a training, the shapes of all tensors must fit.

        Raises:
            UserError: the file is refused or damaged, or does not fit the model.
        """
        self._resumes = checkpointables is None and bool(self.checkpointables)
        try:
            rest = super().load(path, checkpointables)
        except UserError:
            raise
        except _DAMAGED as error:
            if not self._resumes:
                if isinstance(error, RuntimeError):  # the device's, such as CUDA out of memory
                    raise
                raise UserError(
                    f"{path} is not a checkpoint of a detector ({reason(error)})."
                ) from error
            raise UserError(
                f"{path} cannot be resumed: its training state is damaged or of another version "
                f"({described(error)}). Write the name of another checkpoint "
                f"into {LAST_CHECKPOINT}, or start anew with MODEL.WEIGHTS {path}."
            ) from error
        self.origin = read_origin(rest)
        return rest

    def save(self, name: str, **kwargs: Any) -> None:
        """Detectron2's, written whole or not at all.

        Args:
            name: of the file in `save_dir`, without .pth.
            kwargs: more data to save.

        Raises:
            UserError: the file cannot be written; the checkpoints before it are as they were.
        """
        state = {key: each.state_dict() for key, each in self.checkpointables.items()}
        if self._write(name, self.origin_entry, {**state, **kwargs}):
            self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name: str, thresholds: Mapping[str, float], **kwargs: Any) -> None:
        """Saves weights alone: no training can be resumed from this file.

        Args:
            name, kwargs: as for :meth:`save`.
            thresholds: as for :meth:`note_thresholds`.

        Raises:
            UserError: as for :meth:`save`.
        """
        self._write(name, with_thresholds(self.origin_entry, thresholds), kwargs)

    def _write(self, name: str, origin: dict[str, Any] | None, more: Mapping[str, Any]) -> bool:
        if not self.save_dir or not self.save_to_disk:
            return False
        data = {"model": (self.saved_model or self.model).state_dict()}
        if origin is not None:
            data[ORIGIN] = origin
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        try:
            with whole_file(path) as file:
                torch.save({**data, **more}, file)
        except UserError as error:
            raise UserError(
                f"{str(error).rstrip('.')}. Earlier checkpoints are intact: continue with --resume "
                "once there is room."
            ) from error
        return True

    def note_thresholds(self, file_name: str, thresholds: Mapping[str, float]) -> None:
        """Adds the score thresholds of a later evaluation; the file keeps its modification time.

        Args:
            file_name: of the checkpoint, in `save_dir`.
            thresholds: the score thresholds with the best F1, by class name; under the name ""
                the one over all classes.

        Raises:
            UserError: the checkpoint cannot be read or written; the file is as it was.
        """
        path = os.path.join(self.save_dir, file_name)
        if not thresholds or not os.path.isfile(path):
            return
        before, content = os.stat(path), load_file(path)
        content[ORIGIN] = with_thresholds(content.get(ORIGIN), thresholds)
        write_checkpoint(path, content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Detectron2's, written whole or not at all."""
        with whole_file(os.path.join(self.save_dir, LAST_CHECKPOINT)) as file:
            file.write(last_filename_basename.encode())

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Detectron2's, from the newest checkpoint that can be read, the same in all processes.

        A new training resets the running counts of the losses to 0: those of the training that
        the weights come from would distort the gradient density for many steps. :meth:`load`
        keeps them.

        Args:
            path: weights to start from where `resume` is False or there is no checkpoint.
            resume: whether to go on from the last checkpoint in `save_dir`.

        Returns:
            What :meth:`load` returns.

        Raises:
            UserError: no checkpoint can be read, or not by every process.
        """
        name = self._common_checkpoint() if resume else None
        if name is None:
            rest = self.load(path, checkpointables=[])
            _reset_counts(self.model, path)
            return rest
        return self.load(os.path.join(self.save_dir, name))

    def _open_newest(self) -> str | None:
        """The newest checkpoint that can be read: its name, or None where there is none at all."""
        run = RunFolder(self.save_dir)
        if run.last_checkpoint() is None:
            return None
        reasons = []
        for name in run.checkpoints():
            path = os.path.join(self.save_dir, name)
            try:
                self._opened = path, self._open(path)
            except UserError as error:
                reasons.append(str(error).rstrip("."))
                continue
            if "model" not in self._opened[1]:
                reasons.append(f"{name} holds no model")
                continue
            for newer in reasons:
                logger.warning("%s: going back to %s", newer, name)
            return name
        raise UserError(
            f"--resume: no checkpoint in {self.save_dir} can be read ({'; '.join(reasons)}): write "
            f"the name of another checkpoint into {LAST_CHECKPOINT}, or leave --resume out."
        )

    def _common_checkpoint(self) -> str | None:
        name, failure = None, ""
        if comm.is_main_process():
            try:
                name = self._open_newest()
            except UserError as error:
                failure = str(error)
        name, failure = comm.all_gather((name, failure))[0]
        if failure:
            raise UserError(failure)
        here = name is None or os.path.isfile(os.path.join(self.save_dir, name))
        if not all(comm.all_gather(here)):
            raise UserError(
                f"--resume: {name} in {self.save_dir} cannot be seen by every process: OUTPUT_DIR "
                "must be a folder that all machines share."
            )
        return name

    def _load_file(self, filename: str) -> dict[str, Any]:
        self._filename = filename
        if filename.endswith(".pkl"):
            data = self._open(filename)
            if "model" in data and "__author__" in data:
                return data
            # Caffe2 and Detectron1: detectors have "blobs", ImageNet models do not.
            blobs = _mapping(data.get("blobs", data), filename)
            model = {k: v for k, v in blobs.items() if not str(k).endswith("_momentum")}
            return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}
        if filename.endswith(".pyth"):
            data = self._open(filename)
            state = _mapping(data.get("model_state"), filename)
            model = {k: v for k, v in state.items() if not str(k).endswith("num_batches_tracked")}
            return {"model": model, "__author__": "pycls", "matching_heuristics": True}
        return super()._load_file(filename)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if self._resumes and (missing := self.checkpointables.keys() - checkpoint.keys()):
            raise UserError(
                f"{self._filename} holds no state of a training ({', '.join(sorted(missing))}), "
                "only weights: leave --resume out and start anew with MODEL.WEIGHTS "
                f"{self._filename}."
            )
        _check_tensors(_mapping(checkpoint["model"], self._filename), self._filename)
        return super()._load_model(checkpoint)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        # Parameters alone: norms fill in some of their missing buffers.
        parameters = {name for name, _ in self.model.named_parameters()}
        if not incompatible.incorrect_shapes and parameters <= set(incompatible.missing_keys):
            raise UserError(
                f"no tensor in {self._filename} has the name of one in this model: {_WAY_OUT}"
            )
        if self._resumes and (wrong := incompatible.incorrect_shapes):
            name, found, expected = wrong[0]
            raise UserError(
                f"{self._filename} does not fit this model: {name} has the shape {found} instead "
                f"of {expected} ({len(wrong)} such tensors): resume with the config, and the "
                "number of classes, of the training, or start anew with MODEL.WEIGHTS "
                f"{self._filename}."
            )
        if self._starts and not self._resumes:
            incompatible = self._log_what_starts_anew(incompatible)
        super()._log_incompatible_keys(incompatible)

    def _log_what_starts_anew(self, incompatible: Any) -> Any:
        """Logs, without a warning, missing heads and unused layers: a pretrained backbone has both.

        Returns:
            What still deserves a warning.
        """
        missing, unused = incompatible.missing_keys, incompatible.unexpected_keys
        if missing:
            logger.info(
                "%d tensors of the model are not in %s and start anew, as heads on a pretrained "
                "backbone do; %d tensors of the file are not used",
                len(missing),
                self._filename,
                len(unused),
            )
            self.logger.info(get_missing_parameters_message(missing))
        if unused:
            self.logger.info(get_unexpected_parameters_message(unused))
        return incompatible._replace(missing_keys=[], unexpected_keys=[])
