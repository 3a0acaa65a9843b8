"""Where a forward pass stops being finite: inputs, weights, modules, levels and losses."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ghm_d2.losses.base import HarmonizedLoss
from ghm_d2.modeling import DenseLoss

_MOST = 8  # names that a row lists


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        part: "image", "weights", "module", "level", "loss call", "loss" or "gradient".
        name: which image, module, level or loss; for weights and gradients, a fixed phrase.
        finite: whether all its values are finite.
        note: details, such as the range of its values.
    """

    part: str
    name: str
    finite: bool
    note: str = ""


@dataclass
class Diagnosis:
    """What :func:`diagnose` saw, in the order of the computation."""

    rows: list[Row] = field(default_factory=list)

    @property
    def finite(self) -> bool:
        """Whether all rows are finite."""
        return all(row.finite for row in self.rows)

    def bad(self, part: str) -> list[Row]:
        """The rows of one part that are not finite."""
        return [row for row in self.rows if row.part == part and not row.finite]

    def summary(self) -> str:
        """Half a sentence for a message: the causes first; empty where all is finite."""
        words = []
        if found := self.bad("image"):
            words.append(f"image {found[0].name} is not finite itself")
        if found := self.bad("weights"):
            words.append(f"weights not finite before the step: {found[0].note}")
        if found := self.bad("level"):
            words.append(f"predictions at {', '.join(_unique(found))} not finite")
        if found := self.bad("loss call"):
            words.append(f"first loss: {found[0].name}")
        if found := self.bad("module"):
            words.append(f"first output: {found[0].name}")
        return "; ".join(words)

    def table(self) -> str:
        """All rows, one a line."""
        wide = max((len(row.part) for row in self.rows), default=0)
        names = max((len(row.name) for row in self.rows), default=0)
        lines = [
            f"{row.part:<{wide}}  {row.name:<{names}}  {'ok' if row.finite else 'NOT FINITE':<10}  "
            f"{row.note}".rstrip()
            for row in self.rows
        ]
        return "\n".join(lines)


def diagnose(
    model: nn.Module, batch: Sequence[dict[str, Any]], backward: bool = False
) -> Diagnosis:
    """Runs the training forward pass of `batch` once more and looks at everything on the way.

    Args:
        model: in training mode, not wrapped; its running counts change.
        batch: the list of records that the model is called with.
        backward: go backward too, under PyTorch's anomaly detection, if the losses are finite.

    Returns:
        What was finite and what was not. An error of the model becomes a row; it is not raised.
    """
    seen = Diagnosis()
    seen.rows += _input_rows(batch)
    seen.rows.append(_weights_row(model))
    losses: dict[str, Tensor] = {}
    error = ""
    with ExitStack() as stack:
        modules = stack.enter_context(_watch_modules(model))
        levels = stack.enter_context(_watch_levels(model))
        calls = stack.enter_context(_watch_losses(model))
        stack.enter_context(EventStorage())
        stack.enter_context(torch.set_grad_enabled(backward))
        try:
            losses = model(batch)
        except (ValueError, FloatingPointError) as caught:
            error = str(caught)
    seen.rows += modules or [Row("module", "all outputs", not error, error)]
    seen.rows += levels
    seen.rows += calls
    for name, value in losses.items():
        seen.rows.append(Row("loss", name, _finite(value), f"{float(value):.6g}"))
    if backward and losses and all(map(_finite, losses.values())):
        seen.rows += _gradient_rows(model, losses)
    return seen


def describe_images(batch: Sequence[dict[str, Any]]) -> str:
    """Ids and file names of a batch, as messages give them."""
    names = []
    for number, image in enumerate(batch):
        where = image.get("image_id", number)
        file = image.get("file_name")
        names.append(f"{where} ({file})" if file else f"{where}")
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more


def _unique(rows: Sequence[Row]) -> Iterator[str]:
    """The levels of rows such as "P3 logits", each once."""
    return iter(dict.fromkeys(row.name.split()[0] for row in rows))


def _finite(value: Any) -> bool:
    """Whether all tensors in `value` are finite; integer tensors always are."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value.detach()).all())
    if isinstance(value, dict):
        value = list(value.values())
    return not isinstance(value, list | tuple) or all(map(_finite, value))


def _range(tensor: Tensor) -> str:
    if not tensor.numel():
        return "empty"
    finite = tensor.detach()[torch.isfinite(tensor.detach())]
    bad = tensor.numel() - finite.numel()
    lost = f", {bad} of {tensor.numel()} not finite" if bad else ""
    span = f"{float(finite.min()):.4g} to {float(finite.max()):.4g}" if finite.numel() else "none"
    return span + lost


def _input_rows(batch: Sequence[dict[str, Any]]) -> Iterator[Row]:
    for number, image in enumerate(batch):
        notes, good = [f"pixels {_range(image['image'].float())}"], _finite(image["image"])
        instances = image.get("instances")
        if instances is not None and instances.has("gt_boxes"):
            boxes = instances.gt_boxes.tensor
            notes.append(f"{len(boxes)} boxes {_range(boxes)}")
            good = good and _finite(boxes)
            if boxes.shape[1] == 4 and (empty := int((boxes[:, 2:] <= boxes[:, :2]).any(1).sum())):
                notes.append(f"{empty} boxes without area")
        if instances is not None and instances.has("gt_classes") and len(instances):
            classes = instances.gt_classes
            notes.append(f"classes {int(classes.min())} to {int(classes.max())}")
        yield Row(
            "image",
            describe_images([image]) if "file_name" in image else str(number),
            good,
            ", ".join(notes),
        )


def _weights_row(model: nn.Module) -> Row:
    bad = [name for name, value in model.state_dict().items() if not _finite(value)]
    more = f" and {len(bad) - _MOST} more" if len(bad) > _MOST else ""
    return Row("weights", "parameters and buffers", not bad, ", ".join(bad[:_MOST]) + more)


@contextmanager
def _watch_modules(model: nn.Module) -> Iterator[list[Row]]:
    """Rows of the first modules without children whose output is not finite, in call order."""
    rows: list[Row] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            if len(rows) < 3 and not _finite(output):
                origin = "its input was finite" if _finite(inputs) else "nor was its input"
                rows.append(Row("module", f"{name} ({type(module).__name__})", False, origin))

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if not any(True for _ in module.children()) and not isinstance(module, HarmonizedLoss):
                hooks.enter_context(module.register_forward_hook(watch(name)))
        yield rows


def _dense_heads(model: nn.Module) -> Iterator[tuple[nn.Module, Sequence[str]]]:
    """Heads that return two lists with one tensor for each level, and the levels' names."""
    for module in model.modules():
        for head, levels in (("head", "head_in_features"), ("rpn_head", "in_features")):
            if isinstance(found := getattr(module, head, None), nn.Module) and (
                names := getattr(module, levels, None)
            ):
                yield found, [str(name).upper() for name in names]


@contextmanager
def _watch_levels(model: nn.Module) -> Iterator[list[Row]]:
    rows: list[Row] = []

    def watch(levels: Sequence[str]) -> Any:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            if not isinstance(output, tuple) or any(len(part) != len(levels) for part in output):
                return
            for kind, tensors in zip(("logits", "deltas"), output, strict=False):
                for level, tensor in zip(levels, tensors, strict=True):
                    rows.append(Row("level", f"{level} {kind}", _finite(tensor), _range(tensor)))

        return hook

    with ExitStack() as hooks:
        for head, levels in _dense_heads(model):
            hooks.enter_context(head.register_forward_hook(watch(levels)))
        yield rows


@contextmanager
def _watch_losses(model: nn.Module) -> Iterator[list[Row]]:
    """A row for each call of a harmonised loss; one that raises returns NaN, so the rest run."""
    rows: list[Row] = []
    losses = {n: m for n, m in model.named_modules() if isinstance(m, HarmonizedLoss)}
    dense = [m for m in model.modules() if isinstance(m, DenseLoss) and m.ghm_scope == "level"]
    by_level = {loss for each in dense for loss in each}
    levels = [str(name).upper() for name in getattr(model, "head_in_features", ())]

    def watch(name: str, loss: HarmonizedLoss) -> None:
        original, calls = loss.forward_pooled, 0

        def forward_pooled(
            predictions: Any, targets: Any, weights: Any = None, **settings: Any
        ) -> Tensor:
            nonlocal calls
            level = f" {levels[calls % len(levels)]}" if loss in by_level and levels else ""
            calls += 1
            try:
                value = original(predictions, targets, weights, **settings)
                loss.raise_deferred_errors()
                note = f"{float(value.detach()):.6g}"
            except ValueError as error:
                value, note = loss.acc_sum.new_tensor(torch.nan), str(error)
            rows.append(Row("loss call", name + level, _finite(value), note))
            return value

        def forward_levels(predictions: Any, targets: Any) -> Tensor:
            pairs = zip(predictions, targets, strict=True)
            return sum(forward_pooled([x], [target]) for x, target in pairs)

        loss.forward_pooled, loss.forward_levels = forward_pooled, forward_levels

    for name, loss in losses.items():
        watch(name, loss)
    try:
        yield rows
    finally:
        for loss in losses.values():
            del loss.forward_pooled, loss.forward_levels


def _gradient_rows(model: nn.Module, losses: dict[str, Tensor]) -> Iterator[Row]:
    model.zero_grad()
    note = ""
    with warnings.catch_warnings():
        # Anomaly detection warns and prints a traceback; the row names the operation instead.
        warnings.simplefilter("ignore")
        try:
            with torch.autograd.detect_anomaly(check_nan=True):
                sum(losses.values()).backward()
        except RuntimeError as error:
            note = str(error).partition("\n")[0]
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    more = f" and {len(bad) - _MOST} more" if len(bad) > _MOST else ""
    listed = ", ".join(bad[:_MOST]) + more
    yield Row(
        "gradient", "of all losses", not (bad or note), "; ".join(filter(None, (note, listed)))
    )
