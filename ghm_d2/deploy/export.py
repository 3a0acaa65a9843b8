"""A detector as one file, post-processing included: TorchScript, ONNX, torch.export.

All three take one image of any size: (C, H, W) float32, 0 .. 255, its channels in the order of
``INPUT.FORMAT``, resized already as for the test (``INPUT.MIN_SIZE_TEST``, ``MAX_SIZE_TEST``) but
neither normalised nor padded. The boxes are in pixels of that image. The file holds these facts and
the class names as JSON under :data:`METADATA_KEY`.
"""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.export import TracingAdapter
from torch import Tensor, nn

from ghm_d2.deploy.detections import Detections, check_detector, detect
from ghm_d2.deploy.fixed_size import fixed_size_detector
from ghm_d2.deploy.setup import images_of_test
from ghm_d2.engine.settings import Config
from ghm_d2.errors import UserError

__all__ = [
    "FORMATS",
    "METADATA_KEY",
    "describe",
    "example_image",
    "export_detector",
    "load_exported",
    "smallest_side",
]

METADATA_KEY = "ghm_d2.json"
_OUTPUTS = ("boxes", "scores", "classes")
_OPSET = 17  # RoiAlign knows Detectron2's alignment from 16 on


def describe(cfg: Config, model: nn.Module, class_names: list[str] | None) -> dict[str, Any]:
    """What somebody who has the file alone must know."""
    channels, shortest, longest = images_of_test(cfg)
    return {
        "architecture": type(model).__name__,
        "input": "image: (C, H, W) float32, 0 .. 255, resized, neither normalised nor padded",
        "input_format": channels,
        "min_size_test": shortest,
        "max_size_test": longest,
        "smallest_side_torch_export": smallest_side(model),
        "output": "boxes (x1, y1, x2, y2 in pixels of the image), scores, classes; torch_export: "
        "padded to a fixed number of rows, and the count of the real ones",
        "class_names": class_names,
    }


def smallest_side(model: nn.Module) -> int:
    """Height and width, in pixels, from which a torch_export file works.

    The coarsest feature map needs two cells, because torch.export takes a size of 1 for a constant.
    """
    return _coarsest_stride(model) + 1


def _coarsest_stride(model: nn.Module) -> int:
    return max(shape.stride for shape in model.backbone.output_shape().values())


def example_image(model: nn.Module) -> Tensor:
    """An image of noise to trace with, (C, H, W), of unequal sides: equal ones would be tied."""
    stride = _coarsest_stride(model)
    shape = (len(model.pixel_mean), 2 * stride + 1, 3 * stride + 1)
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(shape, generator=generator) * 255).to(model.pixel_mean.device)


def export_detector(
    model: nn.Module, file: str | Path, format: str, metadata: dict[str, Any] | None = None
) -> None:
    """Writes a detector to a file that needs neither Detectron2 nor this package.

    Args:
        model: RetinaNet or Faster R-CNN; it is put into eval mode.
        file: what to write; a file that is there is replaced once the new one is complete.
        format: a key of :data:`FORMATS`.
        metadata: stored in the file as JSON.

    Raises:
        UserError: the model is of another kind, or something that the format needs is not there.
        ValueError: ``format`` is unknown.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {tuple(FORMATS)}, got {format!r}")
    check_detector(model)
    if format != "torchscript" and torch.__version__ < (2, 5):
        raise UserError(
            f"--format {format} needs PyTorch 2.5 or newer, and this is {torch.__version__}: use "
            "--format torchscript."
        )
    model.eval()
    partial = Path(f"{file}.partial")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Tracing warns of every number that it takes for a constant; that the sizes of images
            # are not among them is what the tests and --check look at.
            warnings.simplefilter("ignore")
            _write, _ = FORMATS[format]
            _write(model, partial, json.dumps(metadata or {}))
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def load_exported(file: str | Path, format: str) -> Callable[[Tensor], Detections]:
    """Opens a file of :func:`export_detector` in the runtime that it is for.

    Args:
        file: path.
        format: a key of :data:`FORMATS`.

    Returns:
        A function of an image, (C, H, W) float32.

    Raises:
        UserError: ONNX Runtime is not installed.
    """
    _, load = FORMATS[format]
    return load(file)


def _adapter(model: nn.Module, image: Tensor) -> nn.Module:
    adapter = TracingAdapter(model, image, lambda model, image: tuple(detect(model, image)))
    return adapter.eval()  # the ONNX exporter gives the whole model the mode of its outermost part


def _write_torchscript(model: nn.Module, file: Path, metadata: str) -> None:
    image = example_image(model)
    # The trace is checked by running it beside the model on other sizes, not by tracing it twice.
    traced = torch.jit.trace(_adapter(model, image), (image,), check_trace=False)
    torch.jit.save(traced, str(file), _extra_files={METADATA_KEY: metadata})


def _load_torchscript(file: str | Path) -> Callable[[Tensor], Detections]:
    traced = torch.jit.load(str(file))
    return lambda image: Detections(*traced(image))


def _write_onnx(model: nn.Module, file: Path, metadata: str) -> None:
    onnx = _import("onnx")
    image = example_image(model)
    torch.onnx.export(
        _adapter(model, image),
        (image,),
        str(file),
        dynamo=False,  # torch.export, the newer exporter's base, stops at Detectron2's inference
        opset_version=_OPSET,
        input_names=["image"],
        output_names=list(_OUTPUTS),
        dynamic_axes={
            "image": {1: "height", 2: "width"},
            **{name: {0: "detections"} for name in _OUTPUTS},
        },
    )
    content = onnx.load(str(file))
    onnx.helper.set_model_props(content, {METADATA_KEY: metadata})
    onnx.checker.check_model(content)
    onnx.save(content, str(file))


def _load_onnx(file: str | Path) -> Callable[[Tensor], Detections]:
    session = _import("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Detections:
        found = session.run(list(_OUTPUTS), {"image": image.cpu().numpy()})
        return Detections(*(torch.from_numpy(array) for array in found))

    return run


def _import(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise UserError(
            f"--format onnx needs the package {package}: run pip install onnx onnxruntime."
        ) from error


def _write_torch_export(model: nn.Module, file: Path, metadata: str) -> None:
    smallest = smallest_side(model)
    sides = {i + 1: torch.export.Dim(s, min=smallest) for i, s in enumerate(("height", "width"))}
    try:
        program = torch.export.export(
            fixed_size_detector(model), (example_image(model),), dynamic_shapes={"image": sides}
        )
    except Exception as error:  # torch.export has no common type for what it cannot follow
        reason = " ".join(str(error).split()[:60])
        raise UserError(
            f"torch.export cannot follow this model ({type(error).__name__}: {reason}): use "
            "--format torchscript."
        ) from error
    with open(file, "wb") as stream:  # given a path, it insists on the suffix .pt2
        torch.export.save(program, stream, extra_files={METADATA_KEY: metadata})


def _load_torch_export(file: str | Path) -> Callable[[Tensor], Detections]:
    with open(file, "rb") as stream:
        program = torch.export.load(stream).module()

    def run(image: Tensor) -> Detections:
        boxes, scores, classes, count = program(image)
        return Detections(*(x[: int(count)] for x in (boxes, scores, classes)))

    return run


FORMATS = {
    "torchscript": (_write_torchscript, _load_torchscript),
    "onnx": (_write_onnx, _load_onnx),
    "torch_export": (_write_torch_export, _load_torch_export),
}
