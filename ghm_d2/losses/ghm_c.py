"""GHM-C: gradient-harmonised classification."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Eager, HarmonizedLoss
from .baselines import CrossEntropyLoss, FocalLoss
from .checks import (
    ValueChecks,
    check_choice,
    check_floating,
    check_integer,
    check_non_negative,
    check_weight,
    example_mask,
)
from .functional import sigmoid_examples, softmax_examples
from .kernels import Arguments, EagerPart, FusedExamples, sigmoid_kernel

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class GHMCLoss(HarmonizedLoss):
    """Gradient-harmonised cross entropy (paper, section "GHM-C Loss").

    The value is about 1 whatever the model's quality: it is the mean over unit regions of a loss
    that depends on the region alone. Watch the AP instead, or the plain cross entropy of the
    positives; the plain cross entropy of all examples may rise while a detector learns.
    """

    argument_names = ("logits", "labels")
    not_finite_message = "logits must be finite; they hold NaN or infinite values"

    def __init__(
        self,
        bins: int = 30,
        momentum: float = 0.75,
        loss_weight: float | str = 1.0,
        *,
        activation: str = "sigmoid",
        normalize_by: str = "valid_bins",
        decay_empty_bins: bool = False,
        bias_correction: bool = False,
        sync: bool = False,
        density: str = "unit_region",
        class_dim: int = -1,
        ignore_index: int | None = None,
        class_weight: Sequence[float] | Tensor | None = None,
        reference: CrossEntropyLoss | FocalLoss | None = None,
    ) -> None:
        """
        Args:
            bins: number M of unit regions, at least 1.
            momentum: alpha of the moving average of the counts, in [0, 1); 0: none.
            loss_weight: factor of the loss, at least 0; or "auto": it follows from the gradients,
                see :class:`~ghm_d2.losses.weighted.WeightedLoss`.
            activation: "sigmoid" harmonises every (anchor, class) logit; "softmax" every row.
            normalize_by: divisor D of the region weights: "valid_bins", the regions that hold an
                example of this call (authors' code), or "all_bins", M (paper).
            decay_empty_bins: whether the average of a region without examples decays (paper) or
                stays as it was (authors' code).
            bias_correction: divide the average by `1 - alpha^n`, n its number of updates. The
                authors start from 0 without it, so their first loss is 1 / (1 - alpha) too large.
            sync: pool the counts of all processes and return world_size times this process's
                share, so that the mean over processes is the loss of all examples together.
                Every process must then call the loss equally often.
            density: "unit_region", or "exact" (paper, eq. 6; window 1 / bins; needs momentum 0).
            class_dim: the axis of the logits that holds the classes, such as 1 for
                (N, K, H, W). Logits (N,) are of one class and have no such axis.
            ignore_index: label value that is ignored, such as 255, in integer and dense labels.
                None: -1 in integer labels; nothing is ignored in dense ones.
            class_weight: (K,), at least 0: factor of the loss of each class (in softmax, of each
                row by its class; K + 1 values name the background's too, which is 1 otherwise).
                It does not change the counts, and it takes the whole-tensor path.
            reference: with `loss_weight="auto"`, the loss that the gradient is kept as large as;
                None: for sigmoid focal loss with its own "auto" weight, over the number of
                positives; for softmax mean cross entropy, the only one there.

        Raises:
            ValueError: an argument is out of range; the message names it.
        """
        super().__init__(
            bins,
            momentum,
            loss_weight,
            normalize_by=normalize_by,
            decay_empty_bins=decay_empty_bins,
            bias_correction=bias_correction,
            sync=sync,
            density=density,
        )
        self.activation = check_choice("activation", activation, ("sigmoid", "softmax"))
        self.class_dim = check_integer("class_dim", class_dim)
        ignored = None if ignore_index is None else check_integer("ignore_index", ignore_index)
        self.ignore_index = ignored
        if self.follows_weight:
            self.reference = reference or FocalLoss(loss_weight="auto")
        self._class_weight = _check_class_weight(class_weight)
        self.register_buffer("class_weight", None, persistent=False)
        self._set_class_weight(self.acc_sum.device)

    def _set_class_weight(self, device: torch.device) -> None:
        if self._class_weight is not None:
            self.class_weight = torch.tensor(self._class_weight, device=device)

    def reset_parameters(self) -> None:
        """Sets the running counts to 0, as in a new module; also after `to_empty`."""
        super().reset_parameters()
        self._set_class_weight(self.acc_sum.device)

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        text = f"activation={self.activation!r}, {super().extra_repr()}"
        defaults = {"class_dim": -1, "ignore_index": None, "_class_weight": None}
        for name, default in defaults.items():
            if (value := getattr(self, name)) != default:
                text += f", {name.lstrip('_')}={value!r}"
        return text

    @torch.jit.unused
    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        weight: Tensor | None = None,
        *,
        divisor: float | None = None,
    ) -> Tensor:
        """
        Args:
            logits: (R, K) for sigmoid, (R, K + 1) for softmax, or any shape with the classes along
                `class_dim`; float16, bfloat16, float32, float64.
            labels: integers of the shape of the logits without `class_dim`, (R,): a class in
                [0, K), K = background, or what `ignore_index` says; or, for sigmoid alone, dense
                targets in [0, 1] of the logits' shape. Soft targets (label smoothing, mixup,
                quality) have the gradient norm `|sigmoid(x) - t|` too.
            weight: of the shape of the labels that name classes or, for sigmoid, of the logits; 0
                drops an example, a positive value keeps it. None keeps all.
            divisor: with `loss_weight="auto"`, what the reference loss is divided by in place of
                its own number of positives or rows, above 0.

        Returns:
            A scalar on the graph, float32 (float64 for float64 logits); 0 without examples. It can
            be differentiated twice, with the weights of the examples as constants.

        Raises:
            ValueError: a shape, type or value is wrong; see :meth:`raise_deferred_errors` for
                when values are checked on CUDA.
        """
        return self.forward_pooled([logits], [labels], [weight], divisor=divisor)

    def _layout(self, logits: Tensor, labels: Tensor, weight: Tensor | None) -> Arguments:
        """Logits (R, K), labels (R,) or dense (R, K), weight (R,) or (R, K)."""
        check_floating("logits", logits)
        sigmoid = self.activation == "sigmoid"
        if logits.dim() < (1 if sigmoid else 2):
            needed = "an axis" if sigmoid else "an axis of rows and one of classes"
            raise ValueError(f"logits must have {needed}, got shape {tuple(logits.shape)}")
        if not isinstance(labels, Tensor):
            raise ValueError(f"labels must be a tensor, got {type(labels).__name__}")
        shape = logits.shape
        if logits.dim() == 1:
            axis, rows = 1, shape  # one class
        elif -logits.dim() <= self.class_dim < logits.dim():
            axis = self.class_dim % logits.dim()
            rows = shape[:axis] + shape[axis + 1 :]
        else:
            raise ValueError(
                f"class_dim must be an axis of the logits, whose shape is {tuple(shape)}, "
                f"got {self.class_dim}"
            )
        dense = sigmoid and labels.shape == shape
        if not dense and labels.shape != rows:
            allowed = " or ".join(str(tuple(s)) for s in ((rows, shape) if sigmoid else (rows,)))
            raise ValueError(
                f"labels must have shape {allowed}, got {tuple(labels.shape)} beside logits of "
                f"shape {tuple(shape)}"
            )
        if not dense and labels.dtype not in _INTEGERS:
            raise ValueError(f"labels that name classes must be integers, got {labels.dtype}")
        if labels.is_complex():
            raise ValueError(f"labels must be real numbers, got {labels.dtype}")
        check_weight(weight, rows, shape if sigmoid else rows)
        x = _to_rows(logits, axis)
        if self.class_weight is not None:
            self._check_number_of_class_weights(x.shape[1])
        labels = _to_rows(labels, axis) if dense else _flat(labels)
        if weight is not None:
            by_row = weight.shape == rows and (weight.shape != shape or not dense)
            weight = _flat(weight) if by_row else _to_rows(weight, axis)
        return x, labels, weight

    def _values(
        self, logits: Tensor, labels: Tensor, weight: Tensor | None, checks: ValueChecks
    ) -> Arguments:
        """Logits (R, K), labels (R,) with -1 = ignored or dense (R, K), mask (R, 1) or (R, K)."""
        keep = example_mask(weight, checks)
        if keep is not None and keep.dim() == 1 and self.activation == "sigmoid":
            keep = keep.unsqueeze(1)
        message = self._target_message(logits, labels)
        if labels.dim() == 2:
            return logits, *self._dense_labels(labels, keep, message, checks)
        labels = labels.long()
        ignored = labels == self._ignored
        background = logits.shape[1] - int(self.activation == "softmax")
        inside = (labels >= 0) & (labels <= background)
        checks.require((inside | ignored).all(), message)
        return logits, labels if self._ignored == -1 else labels.masked_fill(ignored, -1), keep

    @property
    def _ignored(self) -> int:
        """The label of an ignored row."""
        return -1 if self.ignore_index is None else self.ignore_index

    def _refusals(self, prediction: Tensor, target: Tensor) -> dict[int, str]:
        bit = 1 if target.dim() == 1 else 8
        own = {bit: self._target_message(prediction, target)}
        return own | super()._refusals(prediction, target)

    def _target_message(self, prediction: Tensor, target: Tensor) -> str:
        if target.dim() == 2:
            return "labels of the logits' shape must lie in [0, 1]"
        k = prediction.shape[1] - int(self.activation == "softmax")
        if self._ignored == -1:
            allowed = f"lie in [-1, {k}] (-1 = ignored, {k} = background)"
        else:
            allowed = f"lie in [0, {k}] ({k} = background) or be {self._ignored} (ignored)"
        return f"labels must {allowed}; they hold a value outside"

    def _reference_gradient(self, arguments: Sequence[Arguments]) -> Tensor:
        if self.activation == "sigmoid":
            return self.reference.gradient_norm(arguments)
        figures = []
        for logits, labels, keep in arguments:
            # |p - t| summed over a row's classes is twice g, here as in the own gradient.
            g = softmax_examples(logits, labels)[1]
            counted = labels >= 0 if keep is None else (labels >= 0) & keep
            figures.append(torch.stack([torch.where(counted, g, 0.0).sum(), counted.sum()]))
        return torch.stack(figures).sum(0)

    def _dense_labels(
        self, labels: Tensor, keep: Tensor | None, message: str, checks: ValueChecks
    ) -> tuple[Tensor, Tensor | None]:
        inside = (labels >= 0) & (labels <= 1)
        if self.ignore_index is not None:
            valid = labels != self.ignore_index
            inside, labels = inside | ~valid, labels.masked_fill(~valid, 0)
            keep = valid if keep is None else keep & valid
        checks.require(inside.all(), message)
        return labels, keep

    def _check_number_of_class_weights(self, columns: int) -> None:
        allowed = [columns] if self.activation == "sigmoid" else [columns - 1, columns]
        if len(self.class_weight) not in allowed:
            raise ValueError(
                f"class_weight must have {' or '.join(map(str, allowed))} values for logits of "
                f"{columns} columns, got {len(self.class_weight)}"
            )

    @property
    def _plain(self) -> bool:
        """Whether there are kernels for these settings."""
        plain = self.activation == "sigmoid" and self.class_weight is None
        return plain and self.density == "unit_region"

    def _device_arguments(self) -> dict[str, Any] | None:
        return {"ignored": self.ignore_index} if self._plain else None

    def _kernel(
        self, arguments: Sequence[Arguments], eager: Eager, constants: dict[str, Any]
    ) -> FusedExamples | None:
        return sigmoid_kernel(arguments, self.bins, eager) if self._plain else None

    def _eager(
        self, logits: Tensor, labels: Tensor, keep: Tensor | None, constants: dict[str, Any]
    ) -> EagerPart:
        if not logits.numel():
            return EagerPart.empty(logits)
        softmax = self.activation == "softmax"
        valid, given = keep, logits
        if labels.dim() == 1:
            counted = labels >= 0 if softmax else (labels >= 0).unsqueeze(1)
            valid = counted if keep is None else counted & (keep.flatten() if softmax else keep)
        if valid is not None:
            # 0 times the NaN of an ignored example would still be NaN.
            logits = logits.masked_fill(~(valid.unsqueeze(1) if softmax else valid), 0)
        loss, norm = (softmax_examples if softmax else sigmoid_examples)(logits, labels)
        if self.class_weight is not None and softmax:
            background = self.class_weight.new_ones(logits.shape[1] - len(self.class_weight))
            loss = loss * torch.cat([self.class_weight, background])[labels.clamp(min=0)]
        elif self.class_weight is not None:
            loss = loss * self.class_weight
        return EagerPart(loss, norm, valid, given)


def _to_rows(x: Tensor, axis: int) -> Tensor:
    """(R, K) from any shape whose axis of classes is `axis`; one class without such an axis."""
    if x.dim() == axis:
        return x.unsqueeze(1)
    if x.dim() == 2 and axis == 1:
        return x
    return x.movedim(axis, -1).reshape(x.numel() // max(x.shape[axis], 1), x.shape[axis])


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 1 else x.reshape(-1)


def _check_class_weight(values: Sequence[float] | Tensor | None) -> list[float] | None:
    if values is None:
        return None
    if isinstance(values, Tensor):
        if values.dim() != 1:
            raise ValueError(f"class_weight must have shape (K,), got {tuple(values.shape)}")
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"class_weight must be (K,) numbers or None, got {type(values).__name__}")
    return [check_non_negative("class_weight", value) for value in values]
