"""A detector as one file, post-processing included: TorchScript, ONNX, torch.export.

All three take one image of any size: (C, H, W) float32, 0 .. 255, its channels in the order of
`INPUT.FORMAT`, resized already as for the test (`INPUT.MIN_SIZE_TEST`, `MAX_SIZE_TEST`) but
neither normalised nor padded; or, with a batch, N such images of one size. The boxes are in pixels
of that image. The file holds these facts and the class names as JSON under :data:`METADATA_KEY`.
"""

import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.export import TracingAdapter
from torch import Tensor, nn

from ghm_d2.engine.settings import Config
from ghm_d2.errors import UserError, described

from .detections import Detections, check_detector, detect
from .fixed_size import fixed_size_detector
from .setup import images_of_test

METADATA_KEY = "ghm_d2.json"
_OUTPUTS = ("boxes", "scores", "classes")
_COUNT = "count"  # of the rows that are not padding
_OPSETS = range(16, 21)  # RoiAlign has Detectron2's alignment since 16; the exporter ends at 20


@dataclass(frozen=True)
class Options:
    """What an exported file takes and returns.

    Attributes:
        fixed_size: whether the outputs have a fixed number of rows, with the count of the real ones
            as a fourth output, for runtimes and converters that cannot follow sizes which depend on
            values. Files of torch_export always do.
        batch: number of images per batch that the file is made and checked with, although it takes
            other numbers too; 0: one image without a batch axis. Implies `fixed_size`.
        half: whether the layers compute in float16; images, boxes and scores stay float32. Implies
            `fixed_size`.
        opset: version of ONNX's operators, 16 to 20.

    Raises:
        UserError: `batch` or `opset` is out of range.
    """

    fixed_size: bool = False
    batch: int = 0
    half: bool = False
    opset: int = 17

    def __post_init__(self) -> None:
        if self.batch < 0:
            raise UserError(f"--batch must be at least 1, got {self.batch}.")
        if self.opset not in _OPSETS:
            raise UserError(
                f"--opset must lie between {_OPSETS[0]} and {_OPSETS[-1]}, got {self.opset}."
            )

    @property
    def padded(self) -> bool:
        """Whether the outputs are padded and a count of the real rows follows them."""
        return self.fixed_size or self.batch > 0 or self.half


def describe(
    cfg: Config, model: nn.Module, class_names: list[str] | None, options: Options = Options()
) -> dict[str, Any]:
    """The facts that users of the exported file need, in values that JSON can hold."""
    channels, shortest, longest = images_of_test(cfg)
    image = "images: (N, C, H, W)" if options.batch else "image: (C, H, W)"
    return {
        "architecture": type(model).__name__,
        "input": f"{image} float32, 0 .. 255, resized, neither normalised nor padded",
        "input_format": channels,
        "min_size_test": shortest,
        "max_size_test": longest,
        "smallest_side_torch_export": smallest_side(model),
        "output": "boxes (x1, y1, x2, y2 in pixels of the image), scores, classes; with fixed_size "
        "and in torch_export padded to a fixed number of rows, and the count of the real ones",
        "fixed_size": options.padded,
        "batch": options.batch > 0,
        "half": options.half,
        "class_names": class_names,
    }


def smallest_side(model: nn.Module) -> int:
    """The smallest height and width, in pixels, that a torch_export file takes.

    The coarsest feature map needs two cells, because torch.export makes a size of 1 a constant.
    """
    return _coarsest_stride(model) + 1


def _coarsest_stride(model: nn.Module) -> int:
    return max(shape.stride for shape in model.backbone.output_shape().values())


def example_image(model: nn.Module) -> Tensor:
    """Noise to trace with, (C, H, W); equal sides would be traced as always equal."""
    stride = _coarsest_stride(model)
    shape = (len(model.pixel_mean), 2 * stride + 1, 3 * stride + 1)
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(shape, generator=generator) * 255).to(model.pixel_mean.device)


def export_detector(
    model: nn.Module,
    file: str | Path,
    format: str,
    metadata: dict[str, Any] | None = None,
    options: Options = Options(),
) -> None:
    """Writes a detector to a file that needs neither Detectron2 nor this package.

    Args:
        model: RetinaNet, FCOS, Faster R-CNN or Cascade R-CNN; it is put into eval mode.
        file: what to write; a file that is there is replaced once the new one is complete.
        format: a key of :data:`FORMATS`.
        metadata: stored in the file as JSON.
        options: what the file takes and gives.

    Raises:
        UserError: the model is of another kind, or a package or PyTorch version that the format
            needs is missing.
        ValueError: `format` is unknown.
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
            # Tracing warns of every number that it makes a constant. The tests and --check make
            # sure that the sizes of images are not among them.
            warnings.simplefilter("ignore")
            _write, _ = FORMATS[format]
            _write(model, partial, json.dumps(metadata or {}), options)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def load_exported(
    file: str | Path, format: str, options: Options = Options()
) -> Callable[[Tensor], Detections]:
    """Opens a file of :func:`export_detector` in the runtime that it is for.

    Args:
        file: path.
        format: a key of :data:`FORMATS`.
        options: what the file was written with.

    Returns:
        A function of an image, (C, H, W) float32. A file with a batch is given `options.batch`
        copies of the image, and the detections in the last copy are returned.

    Raises:
        UserError: ONNX Runtime is not installed.
    """
    _, load = FORMATS[format]
    run = load(file)

    def find(image: Tensor) -> Detections:
        if options.batch:
            image = image.expand(options.batch, *image.shape).contiguous()
        found = list(run(image))
        if options.batch:
            found = [x[-1] for x in found]
        if len(found) == len(_OUTPUTS) + 1:
            count = int(found.pop())
            found = [x[:count] for x in found]
        return Detections(*found)

    return find


def _module(model: nn.Module, image: Tensor, options: Options) -> nn.Module:
    """The module to trace."""
    if options.padded:
        return fixed_size_detector(model, batch=options.batch > 0, half=options.half)
    adapter = TracingAdapter(model, image, lambda model, image: tuple(detect(model, image)))
    return adapter.eval()  # the ONNX exporter sets the whole model to the mode of the outer module


def _example(model: nn.Module, options: Options) -> Tensor:
    image = example_image(model)
    return image.repeat(options.batch, 1, 1, 1) if options.batch else image


def _write_torchscript(model: nn.Module, file: Path, metadata: str, options: Options) -> None:
    image = _example(model, options)
    # The trace is checked by running it beside the model on other sizes, not by tracing it twice.
    traced = torch.jit.trace(_module(model, image, options), (image,), check_trace=False)
    torch.jit.save(traced, str(file), _extra_files={METADATA_KEY: metadata})


def _load_torchscript(file: str | Path) -> Callable[[Tensor], Sequence[Tensor]]:
    return torch.jit.load(str(file))


def _write_onnx(model: nn.Module, file: Path, metadata: str, options: Options) -> None:
    onnx = _import("onnx")
    image = _example(model, options)
    names = [*_OUTPUTS, *([_COUNT] if options.padded else [])]
    axes = {0: "batch", 2: "height", 3: "width"} if options.batch else {1: "height", 2: "width"}
    of_outputs = {0: "batch"} if options.batch else {} if options.padded else {0: "detections"}
    torch.onnx.export(
        _module(model, image, options),
        (image,),
        str(file),
        dynamo=False,  # torch.export, the newer exporter's base, stops at Detectron2's inference
        opset_version=options.opset,
        input_names=[_input_name(options)],
        output_names=names,
        dynamic_axes={_input_name(options): axes, **dict.fromkeys(names, of_outputs)},
    )
    content = onnx.load(str(file))
    onnx.helper.set_model_props(content, {METADATA_KEY: metadata})
    onnx.checker.check_model(content)
    onnx.save(content, str(file))


def _input_name(options: Options) -> str:
    return "images" if options.batch else "image"


def _load_onnx(file: str | Path) -> Callable[[Tensor], Sequence[Tensor]]:
    session = _import("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (image,) = session.get_inputs()
    return lambda x: [torch.from_numpy(y) for y in _arrays(session, image.name, x)]


def _arrays(session: Any, name: str, image: Tensor) -> list[Any]:
    return [np.asarray(x) for x in session.run(None, {name: image.cpu().numpy()})]


def _import(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise UserError(
            f"--format onnx needs the package {package}: run pip install onnx onnxruntime."
        ) from error


def _write_torch_export(model: nn.Module, file: Path, metadata: str, options: Options) -> None:
    smallest = smallest_side(model)
    sides = {i: torch.export.Dim(s, min=smallest) for i, s in ((-2, "height"), (-1, "width"))}
    image = _example(model, options)
    if options.batch == 1:  # torch.export makes a size of 1 a constant
        image = image.repeat(2, 1, 1, 1)
    shapes = {image.dim() + i: dim for i, dim in sides.items()}
    if options.batch:
        shapes[0] = torch.export.Dim("batch", min=1, max=1024)
    try:
        program = torch.export.export(
            fixed_size_detector(model, batch=options.batch > 0, half=options.half),
            (image,),
            dynamic_shapes=(shapes,),
        )
    except Exception as error:  # torch.export has no common type for what it cannot follow
        raise UserError(
            f"torch.export cannot follow this model ({described(error)}): use --format torchscript."
        ) from error
    with open(file, "wb") as stream:  # given a path, it insists on the suffix .pt2
        torch.export.save(program, stream, extra_files={METADATA_KEY: metadata})


def _load_torch_export(file: str | Path) -> Callable[[Tensor], Sequence[Tensor]]:
    with open(file, "rb") as stream:
        return torch.export.load(stream).module()


FORMATS = {
    "torchscript": (_write_torchscript, _load_torchscript),
    "onnx": (_write_onnx, _load_onnx),
    "torch_export": (_write_torch_export, _load_torch_export),
}
