"""The backbone of mmdetection's RetinaNet: Detectron2's, but for one ReLU."""

import torch

from tests.detectors import small_model

MMDET = ("MODEL.BACKBONE.NAME", "build_mmdet_retinanet_resnet_fpn_backbone")


def test_only_p7_differs_by_the_relu():
    stock = small_model("ghm_retinanet_R_50").eval().backbone
    ours = small_model("ghm_retinanet_R_50", *MMDET).eval().backbone
    ours.load_state_dict(stock.state_dict())
    image = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        a, b = stock(image), ours(image)
        assert list(a) == list(b) == ["p3", "p4", "p5", "p6", "p7"]
        assert all(torch.equal(a[p], b[p]) for p in ("p3", "p4", "p5", "p6"))
        assert (b["p6"] < 0).any()
        assert torch.equal(b["p7"], ours.top_block.p7(b["p6"]))
        assert not torch.equal(a["p7"], b["p7"])
        assert torch.equal(a["p7"], stock.top_block.p7(b["p6"].relu()))
