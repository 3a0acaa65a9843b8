"""Exported files beside the model: same detections on images of other sizes than the traced one."""

import functools
import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from torch.torch_version import TorchVersion

from ghm_d2.data.pictures import read_image
from ghm_d2.deploy.detections import (
    Detections,
    check_detector,
    compare_detections,
    detect,
    limits,
)
from ghm_d2.deploy.export import (
    FORMATS,
    METADATA_KEY,
    Options,
    describe,
    example_image,
    export_detector,
    load_exported,
    smallest_side,
)
from ghm_d2.deploy.fixed_size import fixed_size_detector
from ghm_d2.deploy.setup import image_preparer
from ghm_d2.errors import UserError
from tests.detectors import small_config
from tests.exportable import (
    BASES,
    FASTER_RCNN,
    OPTS,
    RETINANET,
    detector,
    picture,
    skip_where_refused,
    tensor,
)

CASCADE = "ghm_cascade_rcnn_R_50"
RES5 = (
    *("MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", ("res4",)),
    *("MODEL.RPN.IN_FEATURES", ("res4",), "MODEL.BACKBONE.NAME", "build_resnet_backbone"),
    *("MODEL.RESNETS.OUT_FEATURES", ("res4",), "MODEL.RESNETS.DEPTH", 50),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", 16, "MODEL.ANCHOR_GENERATOR.SIZES", "[[32, 64, 128]]"),
)

SIZES = [(131, 130), (150, 233), (240, 129), (160, 160)]


# torch.export takes ten seconds and more for a model, and about as long to load the file.
SLOW = [pytest.param(FASTER_RCNN, "torch_export", marks=pytest.mark.slow)]
CASES = [(b, f) for b in BASES for f in FORMATS if (b, f) != (FASTER_RCNN, "torch_export")] + SLOW


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Writes each file once: (base, format) -> path."""
    folder, files = tmp_path_factory.mktemp("exported"), {}

    def get(base, format):
        skip_where_refused(format)
        if (base, format) not in files:
            files[base, format] = folder / f"{base}.{format}"
            export_detector(detector(base), files[base, format], format, {"hello": [1, 2]})
        return files[base, format]

    return get


@pytest.fixture(scope="module")
def loaded(exported):
    """Loads each file once: (base, format) -> function of an image."""
    return functools.cache(lambda base, format: load_exported(exported(base, format), format))


def assert_same(model, run, images):
    """At least one detection in every image, and the same from both."""
    for image in images:
        with torch.no_grad():
            expected, actual = detect(model, image), run(image)
        assert len(expected.scores) > 0
        assert [x.dtype for x in actual] == [torch.float32, torch.float32, torch.int64]
        result = compare_detections(expected, actual, *limits(model))
        assert result.missing == 0 and result.matched >= len(expected.scores) - 1, result
        assert result.score_difference <= 1e-4


@pytest.mark.parametrize(("base", "format"), CASES)
def test_exported_file_finds_the_same_at_every_size(base, format, loaded):
    run = loaded(base, format)
    images = [tensor(picture(*size, seed=k)) for k, size in enumerate(SIZES)]
    assert all(x.shape != example_image(detector(base)).shape for x in images)
    assert_same(detector(base), run, images)


@pytest.mark.parametrize("data", ["bccd/images", "coco-mini/val2017"])
@pytest.mark.parametrize(("base", "format"), CASES)
def test_exported_file_finds_the_same_on_real_images(base, format, data, loaded, shared_dir):
    files = sorted((shared_dir / "data" / data).glob("*.jpg"))[:5]
    assert len(files) == 5
    prepare = image_preparer(small_config(base, *OPTS))
    run = loaded(base, format)
    assert_same(detector(base), run, [prepare(read_image(file)) for file in files])


@pytest.mark.parametrize(("base", "format"), CASES)
def test_nothing_found_is_no_error(base, format, loaded):
    run = loaded(base, format)
    image = torch.full((3, 140, 150), float("nan"))  # no score passes a threshold
    boxes, scores, classes = run(image)
    assert boxes.shape == (0, 4) and scores.shape == classes.shape == (0,)


@pytest.mark.parametrize("base", BASES)
def test_fixed_size_outputs_are_padded(base):
    model = detector(base)
    image = tensor(picture(140, 150))
    _, most = limits(model)
    with torch.no_grad():
        expected = detect(model, image)
        boxes, scores, classes, count = fixed_size_detector(model)(image)
        assert boxes.shape == (most, 4) and scores.shape == classes.shape == (most,)
        n = int(count)
        assert torch.equal(boxes[:n], expected.boxes)
        assert torch.equal(scores[:n], expected.scores)
        assert torch.equal(classes[:n], expected.classes)
        assert not boxes[n:].any() and not scores[n:].any() and (classes[n:] == -1).all()


@pytest.mark.parametrize(
    ("base", "opts"),
    [
        (RETINANET, ("MODEL.RETINANET.SCORE_THRESH_TEST", 0.15)),
        (RETINANET, ("MODEL.RETINANET.TOPK_CANDIDATES_TEST", 20, "TEST.DETECTIONS_PER_IMAGE", 17)),
        (RETINANET, ("MODEL.RETINANET.NMS_THRESH_TEST", 0.1)),
        (RETINANET, ("MODEL.GHM.CLIP_BEFORE_NMS", True)),
        (RETINANET, ("MODEL.ANCHOR_GENERATOR.SIZES", "[[900.0]]")),
        (FASTER_RCNN, ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.55)),
        (FASTER_RCNN, ("MODEL.RPN.PRE_NMS_TOPK_TEST", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 30)),
        (FASTER_RCNN, ("MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)),
        (FASTER_RCNN, ("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True)),
        (FASTER_RCNN, ("MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.1)),
        (CASCADE, ()),
        (CASCADE, ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.4)),
        (FASTER_RCNN, RES5),
        (FASTER_RCNN, RES5 + ("MODEL.ROI_HEADS.NMS_THRESH_TEST", 0.3)),
    ],
)
def test_fixed_size_detector_follows_the_settings(base, opts):
    """Bit for bit what Detectron2's inference finds, padding included in neither."""
    model = detector(base, *opts)
    fixed = fixed_size_detector(model)
    counts = []
    for seed, size in enumerate([(140, 150), (97, 231)]):
        image = tensor(picture(*size, seed=seed))
        with torch.no_grad():
            expected = detect(model, image)
            *found, count = fixed(image)
        counts.append(int(count))
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x[: int(count)], y)
    assert max(counts) > 0


def test_boxes_without_area_are_dropped_as_detectron2_does():
    """Anchors of 2 pixels moved far to the left end up outside the image, clipped to nothing."""
    model = detector(RETINANET, "MODEL.ANCHOR_GENERATOR.SIZES", "[[2.0]]")
    image = tensor(picture(140, 150))
    bias = model.head.bbox_pred.bias
    with torch.no_grad():
        before = bias.clone()
        bias.view(-1, 4)[:, 0] = -20.0
        expected = detect(model, image)
        *found, count = fixed_size_detector(model)(image)
        bias.copy_(before)
    assert 0 < int(count) == len(expected.scores) < limits(model)[1]
    assert torch.equal(found[0][: int(count)], expected.boxes)


def test_model_is_left_as_it_was(exported):
    model = detector(FASTER_RCNN)
    before = repr(model)
    fixed_size_detector(model)
    assert repr(model) == before and not model.training


@pytest.mark.parametrize("format", FORMATS)
def test_file_tells_what_it_is(format, exported):
    file = exported(RETINANET, format)
    if format == "onnx":
        import onnx

        content = onnx.load(str(file))
        text = {p.key: p.value for p in content.metadata_props}[METADATA_KEY]
        sides = [d.dim_param for d in content.graph.input[0].type.tensor_type.shape.dim]
        assert sides == ["", "height", "width"]
    else:
        with zipfile.ZipFile(file) as archive:
            (name,) = [n for n in archive.namelist() if n.endswith(METADATA_KEY)]
            text = archive.read(name).decode()
    assert json.loads(text) == {"hello": [1, 2]}


@pytest.mark.parametrize(
    ("format", "code"),
    [
        ("torchscript", "m = torch.jit.load(f); n = len(m(x)[1])"),
        pytest.param(
            "torch_export",
            "m = torch.export.load(open(f, 'rb')).module(); n = int(m(x)[3])",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_file_needs_torch_and_torchvision_alone(format, code, exported, tmp_path):
    image = tensor(picture(150, 170))
    torch.save(image, tmp_path / "image.pt")
    lines = [
        "import sys, torch, torchvision",
        "sys.modules.update(dict.fromkeys(['detectron2', 'fvcore', 'ghm_d2']))",  # not importable
        f"f = {str(exported(RETINANET, format))!r}",
        f"x = torch.load({str(tmp_path / 'image.pt')!r})",
        code,
        "print(n)",
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        assert int(done.stdout) == len(detect(detector(RETINANET), image).scores) > 0


def test_description():
    cfg = small_config(RETINANET, *OPTS, "INPUT.FORMAT", "RGB")
    found = describe(cfg, detector(RETINANET), ["a", "b", "c"])
    assert found["input_format"] == "RGB" and found["class_names"] == ["a", "b", "c"]
    assert (found["min_size_test"], found["max_size_test"]) == (150, 300)
    assert found["smallest_side_torch_export"] == smallest_side(detector(RETINANET)) == 129
    assert smallest_side(detector(FASTER_RCNN)) == 65
    json.dumps(found)


def test_interrupted_export_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "model.ts"
    file.write_text("old")

    def stops(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("ghm_d2.deploy.export.detect", stops)
    with pytest.raises(KeyboardInterrupt):
        export_detector(detector(RETINANET), file, "torchscript")
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["model.ts"]


def test_misuse():
    with pytest.raises(ValueError, match="format must be one of .*torchscript.*got 'caffe'"):
        export_detector(detector(RETINANET), "x", "caffe")
    for opts, message in (
        (("MODEL.META_ARCHITECTURE", "SemanticSegmentor"), "SemanticSegmentor .* neither"),
        (("MODEL.MASK_ON", True), "MODEL.MASK_ON False"),
    ):
        from detectron2.modeling import build_model

        model = build_model(small_config(FASTER_RCNN, *OPTS, *opts))
        with pytest.raises(UserError, match=message):
            check_detector(model)


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
def test_old_torch_is_named(format, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.4.1"))
    with pytest.raises(UserError, match=f"{format} needs PyTorch 2.5 or newer, and this is 2.4.1"):
        export_detector(detector(RETINANET), tmp_path / "m", format)


# --- batches, half precision, other runtimes ----------------------------------------------------

IMAGES = [tensor(picture(150, 170, seed=seed)) for seed in range(3)]
DETECTORS = (RETINANET, FASTER_RCNN, CASCADE)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes each file once: (base, opts, format, options) -> path."""
    folder = tmp_path_factory.mktemp("written")

    @functools.cache
    def get(base, opts, format, options):
        skip_where_refused(format)
        file = folder / f"{get.cache_info().misses}.{format}"
        export_detector(detector(base, *opts), file, format, {}, options)
        return file

    return get


def run_onnxruntime(file, x):
    session = pytest.importorskip("onnxruntime").InferenceSession(
        str(file), providers=["CPUExecutionProvider"]
    )
    (image,) = session.get_inputs()
    return session.run(None, {image.name: x.numpy()})


def run_openvino(file, x):
    core = pytest.importorskip("openvino").Core()
    # By default it computes in what the processor is fastest in.
    model = core.compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [np.array(value) for value in model(x.numpy()).values()]


@torch.no_grad()
def run_torch(file, x):
    return [y.numpy() for y in torch.jit.load(str(file))(x)]


RUNTIMES = {"torchscript": [run_torch], "onnx": [run_onnxruntime, run_openvino]}


def rows(outputs, image=None):
    """The detections of one image, its padding cut off after it was looked at."""
    boxes, scores, classes, count = outputs if image is None else [x[image] for x in outputs]
    n = int(count)
    assert not boxes[n:].any() and not scores[n:].any() and (classes[n:] == -1).all()
    found = [torch.from_numpy(np.array(x[:n])) for x in (boxes, scores, classes)]
    return Detections(found[0].float(), found[1].float(), found[2].long())


@pytest.mark.parametrize("base", DETECTORS)
def test_a_batch_is_its_images(base):
    """Of three images, each has what it has alone; so have two of them."""
    model = detector(base)
    fixed = fixed_size_detector(model, batch=True)
    for images in (IMAGES, IMAGES[1:]):
        with torch.no_grad():
            outputs = [x.numpy() for x in fixed(torch.stack(images))]
            expected = [detect(model, image) for image in images]
        for number, found in enumerate(expected):
            result = compare_detections(found, rows(outputs, number), *limits(model))
            assert result.missing == 0 and result.matched >= len(found.scores) - 1 > 0, result


@pytest.mark.parametrize("format", RUNTIMES)
@pytest.mark.parametrize("base", DETECTORS)
def test_file_for_batches(base, format, written):
    """Made with two images, run on three and on one."""
    model = detector(base)
    file = written(base, (), format, Options(batch=2))
    for run in RUNTIMES[format]:
        for images in (IMAGES, IMAGES[:1]):
            outputs = run(file, torch.stack(images))
            for number, image in enumerate(images):
                with torch.no_grad():
                    expected = detect(model, image)
                result = compare_detections(expected, rows(outputs, number), *limits(model))
                assert result.missing <= 1 and result.matched >= len(expected.scores) - 1 > 0, run


@pytest.mark.parametrize("format", RUNTIMES)
def test_half_precision_runs(format, written):
    """The layers alone: weights in float16, boxes and scores in float32 and nearly the same."""
    model = detector(RETINANET)
    file = written(RETINANET, (), format, Options(half=True))
    whole = written(RETINANET, (), format, Options(fixed_size=True))
    assert file.stat().st_size < 0.6 * whole.stat().st_size
    for run in RUNTIMES[format]:
        outputs = run(file, IMAGES[0])
        assert [x.dtype for x in outputs[:2]] == [np.float32] * 2
        with torch.no_grad():
            expected = detect(model, IMAGES[0])
        result = compare_detections(expected, rows(outputs), *limits(model), 0.02, 3.0)
        assert result.matched > 0.9 * len(expected.scores) > 0
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("base", BASES)
def test_other_runtimes_find_nothing_where_nothing_is(base, written):
    """OpenVINO gives a row of score 0 for Detectron2's own inference of a Faster R-CNN."""
    part = "RETINANET" if base == RETINANET else "ROI_HEADS"
    opts = (f"MODEL.{part}.SCORE_THRESH_TEST", 0.9999)
    file = written(base, opts, "onnx", Options(fixed_size=True))
    for run in RUNTIMES["onnx"]:
        assert len(rows(run(file, IMAGES[0])).scores) == 0


@pytest.mark.parametrize("way", ["int8", "float16"])
def test_converters_of_onnxruntime(way, written, tmp_path):
    """Quantised weights and float16 of ONNX Runtime's own converters load and find much the same.

    The float32 model is compared by what it finds; int8 rounds random weights too coarsely to.
    """
    onnx = pytest.importorskip("onnx")
    source = written(RETINANET, (), "onnx", Options(fixed_size=True))
    file = tmp_path / "converted.onnx"
    if way == "int8":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(str(source), str(file), weight_type=QuantType.QUInt8)
    else:
        from onnxruntime.transformers import float16

        model = float16.convert_float_to_float16(onnx.load(str(source)), keep_io_types=True)
        onnx.save(model, str(file))
    assert file.stat().st_size < 0.6 * source.stat().st_size
    found = rows(run_onnxruntime(file, IMAGES[0]))
    with torch.no_grad():
        expected = detect(detector(RETINANET), IMAGES[0])
    result = compare_detections(expected, found, 0.0, 100, 0.1, 8.0)
    assert result.matched > (0.4 if way == "int8" else 0.9) * len(expected.scores) > 0


def test_no_double_in_onnx(written):
    """TensorRT has no float64, and ONNX's NonMaxSuppression none either."""
    onnx = pytest.importorskip("onnx")
    for base in DETECTORS:
        options = Options(batch=2) if base == CASCADE else Options(fixed_size=True)
        graph = onnx.load(str(written(base, (), "onnx", options))).graph
        to = {a.i for n in graph.node if n.op_type == "Cast" for a in n.attribute}
        assert onnx.TensorProto.DOUBLE not in to
        assert onnx.TensorProto.DOUBLE not in {x.data_type for x in graph.initializer}


def test_opset(written):
    onnx = pytest.importorskip("onnx")
    file = written(RETINANET, (), "onnx", Options(opset=20))
    assert [x.version for x in onnx.load(str(file)).opset_import if not x.domain] == [20]
    for arguments in ({"opset": 15}, {"opset": 21}, {"batch": -1}):
        with pytest.raises(UserError, match=f"--{next(iter(arguments))} must"):
            Options(**arguments)


@pytest.fixture(scope="module")
def fcos():
    """Built by a Python config alone; the outputs are spread as those of a trained one."""
    cfg = LazyConfig.load("configs/lazy/ghm_fcos_R_50.py").model
    cfg.backbone.bottom_up.stages.depth = 18
    cfg.backbone.bottom_up.stages.pop("stride_in_1x1", None)  # of bottlenecks
    cfg.head.conv_dims = [32]  # GroupNorm has 32 groups
    cfg.num_classes = 3
    model = instantiate(cfg).eval()
    model.test_score_thresh = 0.1
    model.test_topk_candidates = 10_000  # all: of equal scores, either may be the last taken
    for layer in (model.head.cls_score, model.head.ctrness, model.head.bbox_pred):
        seen = []
        hook = layer.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        with torch.no_grad():
            model([{"image": IMAGES[0]}])
            hook.remove()
            layer.weight.mul_(1 / torch.cat([x.flatten() for x in seen]).std())
            layer.bias.zero_()
    return model


@pytest.mark.parametrize("fmt", ["torchscript", "onnx", "torch_export"])
def test_fcos(fmt, fcos, tmp_path):
    if fmt == "onnx":
        pytest.importorskip("onnxruntime")
    export_detector(fcos, tmp_path / "fcos", fmt, {}, Options(fixed_size=True))
    run = load_exported(tmp_path / "fcos", fmt)
    for image in IMAGES:
        with torch.no_grad():
            expected, found = detect(fcos, image), run(image)
        result = compare_detections(expected, found, *limits(fcos))
        # ONNX Runtime takes others of equal scores at the end of the list.
        assert (
            result.missing <= 2 * (fmt == "onnx") and result.matched >= len(expected.scores) - 1 > 0
        ), result


def boxes(*rows):
    """Detections from rows of (left, score, class); each box is 10 pixels wide and high."""
    table = np.array(rows, dtype=np.float32).reshape(-1, 3)
    left = torch.from_numpy(table[:, 0])
    xyxy = torch.stack((left, left, left + 10, left + 10), dim=1)
    return Detections(xyxy, torch.from_numpy(table[:, 1]), torch.from_numpy(table[:, 2]).long())


@pytest.mark.parametrize(
    ("expected", "actual", "matched", "missing"),
    [
        ([], [], 0, 0),
        ([(0, 0.9, 1), (5, 0.8, 0)], [(5, 0.8, 0), (0, 0.9, 1)], 2, 0),
        ([(0, 0.9, 1)], [(0.05, 0.90005, 1)], 1, 0),
        ([(0, 0.9, 1)], [(0.3, 0.9, 1)], 0, 2),
        ([(0, 0.9, 1)], [(0, 0.9002, 1)], 0, 2),
        ([(0, 0.9, 1)], [(0, 0.9, 2)], 0, 2),
        ([(0, 0.9, 1)], [], 0, 1),
        ([], [(0, 0.9, 1)], 0, 1),
        ([(0, 0.9, 1), (0, 0.9, 1)], [(0, 0.9, 1)], 1, 1),
        ([(0, 0.9, 1), (5, 0.50005, 1)], [(0, 0.9, 1)], 1, 0),  # at the threshold
        ([(k, 0.9 - k / 10, 1) for k in range(3)], [(0, 0.9, 1), (1, 0.8, 1), (7, 0.7, 1)], 2, 0),
        ([(k, 0.9 - k / 10, 1) for k in range(3)], [(0, 0.9, 1), (8, 0.8, 1), (2, 0.7, 1)], 2, 2),
    ],
)
def test_comparison(expected, actual, matched, missing):
    """Threshold 0.5, three detections at most."""
    result = compare_detections(boxes(*expected), boxes(*actual), 0.5, 3)
    assert (result.expected, result.matched, result.missing) == (len(expected), matched, missing)


def test_comparison_tells_the_largest_differences():
    result = compare_detections(
        boxes((0, 0.9, 1), (5, 0.8, 0)), boxes((0, 0.90004, 1), (5.0625, 0.80002, 0)), 0.5, 100
    )
    assert result.score_difference == pytest.approx(4e-5, abs=1e-6)
    assert result.box_difference == pytest.approx(0.0625)
