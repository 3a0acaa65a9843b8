"""Export a detector, then compare what the file and the model find."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ghm_d2.data.pictures import read_image
from ghm_d2.deploy.detections import Comparison, Detections, compare_detections, detect, limits
from ghm_d2.deploy.export import (
    FORMATS,
    Options,
    describe,
    example_image,
    export_detector,
    load_exported,
    smallest_side,
)
from ghm_d2.deploy.setup import (
    IMAGE_SUFFIXES,
    build_detector,
    image_preparer,
    list_files,
    tool_parser,
)
from ghm_d2.engine.arguments import Parser, make_output_folder, parse_arguments
from ghm_d2.errors import UserError, exits_with_one_sentence

_PROGRAM = "ghm-d2 export"
_DIFFERENT = 1  # exit code
_FLAGS = ("-h", "--help", "--half", "--fixed-size")
# Two detections of the same thing: float16 has three digits.
_HALF = {"score_tolerance": 0.02, "box_tolerance": 3.0}


def _parser() -> Parser:
    parser = tool_parser(
        _PROGRAM,
        f"--format {{{','.join(FORMATS)}}} --output FILE [--check IMAGE ...]",
        "Write a RetinaNet, FCOS, Faster R-CNN or Cascade R-CNN, post-processing included, as one "
        "file that runs without Detectron2 on images of any size.",
    )
    add = parser.add_argument
    add("--format", choices=tuple(FORMATS), required=True, help="what to write")
    add(
        "--output", metavar="FILE", required=True, help="file to write; an existing one is replaced"
    )
    add(
        "--batch",
        type=int,
        metavar="N",
        help="take N images of one size at once, (N, C, H, W); any other number works too",
    )
    add(
        "--fixed-size",
        action="store_true",
        help="pad the outputs to TEST.DETECTIONS_PER_IMAGE rows and add their count, as OpenVINO, "
        "TensorRT and quantisers need it (implied by --batch, --half and torch_export)",
    )
    add(
        "--half",
        action="store_true",
        help="run the layers in float16; images and boxes stay float32",
    )
    add("--opset", type=int, metavar="N", help=f"operator set of ONNX ({Options.opset})")
    add(
        "--check",
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="images, or folders of images, on which the file must find what the model finds",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write the file and compare.

    Args:
        argv: the arguments without the program's name; `sys.argv[1:]` by default.

    Raises:
        SystemExit: code 2 after a mistake of the user, reported in one sentence on stderr; code 1
            where the file finds something else than the model.
    """
    with exits_with_one_sentence(_PROGRAM):
        args = parse_arguments(argv, _parser(), flags=_FLAGS, lists=("--check",))
        options = _options(args)
        _check_output(Path(args.output))
        files = list_files(args.check, IMAGE_SUFFIXES)
        detector = build_detector(args)
        cfg, model, classes = detector.cfg, detector.model, detector.metadata
        prepare = image_preparer(cfg)
        images = {str(f): prepare(read_image(f)) for f in files}
        _check_sizes(images, model, args.format)
        metadata = describe(cfg, model, classes.get("thing_classes"), options)
        print(f"Exporting to {args.output} ...", flush=True)
        export_detector(model, args.output, args.format, metadata, options)
        same = _run_beside(model, args, images, options)
    if not same:
        print(f"{_PROGRAM}: {args.output} does not find what the model finds.", file=sys.stderr)
        sys.exit(_DIFFERENT)


def _options(args: argparse.Namespace) -> Options:
    """What the file is to take and to give.

    Raises:
        UserError: a number is out of range, or --opset is given for another format.
    """
    if args.batch is not None and args.batch < 1:
        raise UserError(f"--batch must be at least 1, got {args.batch}.")
    if args.opset is not None and args.format != "onnx":
        raise UserError(f"--opset is for ONNX alone: leave it out with --format {args.format}.")
    opset = Options.opset if args.opset is None else args.opset
    fixed = args.fixed_size or args.format == "torch_export"
    return Options(fixed_size=fixed, batch=args.batch or 0, half=args.half, opset=opset)


def _check_output(file: Path) -> None:
    if file.is_dir():
        raise UserError(f"--output {file} is a folder: name a file.")
    make_output_folder(file.parent)


def _check_sizes(images: dict[str, Tensor], model: nn.Module, format: str) -> None:
    smallest = smallest_side(model) if format == "torch_export" else 1
    for name, image in images.items():
        if min(image.shape[-2:]) < smallest:
            height, width = image.shape[-2:]
            raise UserError(
                f"{name} is {width} x {height} pixels after resizing, and a torch_export file of "
                f"this model takes no side below {smallest}: raise INPUT.MIN_SIZE_TEST or leave "
                "the image out."
            )


def _run_beside(
    model: nn.Module, args: argparse.Namespace, images: dict[str, Tensor], options: Options
) -> bool:
    """Run model and file on the images, or on noise where there are none; print what came out.

    Returns:
        Whether they find the same; a file in half precision may differ, and is compared for the
        figures alone.
    """
    exported = load_exported(args.output, args.format, options)
    tolerances = _HALF if options.half else {}
    device = example_image(model).device
    shown = images or {"noise": example_image(model)}
    seconds = {"file": 0.0, "model": 0.0}
    results: dict[str, Comparison] = {}
    with torch.no_grad():
        for _ in range(2):  # TorchScript optimises in its first runs
            exported(next(iter(shown.values())).to(device))
        for name, image in tqdm(shown.items(), desc="running both"):
            image = image.to(device)
            found: dict[str, Detections] = {}
            for kind, run in (("file", exported), ("model", lambda x: detect(model, x))):
                start = time.perf_counter()
                found[kind] = Detections(*(x.cpu() for x in run(image)))
                seconds[kind] += time.perf_counter() - start
            results[name] = compare_detections(
                found["model"], found["file"], *limits(model), **tolerances
            )
    seconds["file"] /= options.batch or 1
    if images:
        _print_results(results)
    speed = ", ".join(f"{kind} {total / len(shown):.3f}" for kind, total in seconds.items())
    print(f"Wrote {args.output} ({args.format}). Seconds per image on {device}: {speed}.")
    return options.half or not images or not any(r.missing for r in results.values())


def _print_results(results: dict[str, Comparison]) -> None:
    for name, result in results.items():
        at_the_end = result.matched < result.expected and not result.missing
        print(
            f"{name}: {result.matched} of {result.expected} detections are the same, "
            f"{'the others tie with the last of the list in score, ' if at_the_end else ''}"
            f"{result.missing} were found by one side alone; largest difference "
            f"{result.score_difference:.1e} in a score, {result.box_difference:.1e} px in a box"
        )
    if not sum(r.expected for r in results.values()):
        print("The model found nothing on these images, so the comparison shows little.")
