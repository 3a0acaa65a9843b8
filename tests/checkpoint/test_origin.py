"""Names of classes and fingerprints of data travel with the weights; a contradiction stops."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog

from ghm_d2.checkpoint.origin import ORIGIN, changed_data, check_classes, origin_entry, read_origin
from ghm_d2.cli.predict import main as predict
from ghm_d2.data import check_coco_dataset, parse_dataset, register_coco_dataset
from ghm_d2.data.registration import data_fingerprint
from ghm_d2.engine import main
from ghm_d2.errors import UserError
from ghm_d2.model_zoo.export import export_run
from ghm_d2.run_parts import Record
from tests.exportable import write_pictures
from tests.tiny import CLASSES, RETINANET, coco_content, forget_program, one_sentence, tiny_pairs
from tests.tiny import write_coco as write


@pytest.fixture(autouse=True)
def clean_up():
    yield
    forget_program()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the data of a training, and its OUTPUT_DIR "out"."""
    folder = tmp_path_factory.mktemp("trained")
    data = [f"{name}={write(folder, name)}" for name in ("first", "second")]
    pairs = tiny_pairs(OUTPUT_DIR=folder / "out", MODEL__RETINANET__SCORE_THRESH_TEST=0.0)
    main(["--config-file", RETINANET, "--dataset", *data, *pairs])
    forget_program()
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy, to be changed."""
    return shutil.copytree(trained, tmp_path / "run")


def words(folder, *more, first="first", second="second"):
    files = {name: folder / f"{name}.json" for name in (first, second)}
    data = [f"{name}={file},{folder / 'images'}" for name, file in files.items()]
    pairs = tiny_pairs(OUTPUT_DIR=folder / "out", SOLVER__MAX_ITER=3)
    return ["--config-file", RETINANET, "--dataset", *data, *more, *pairs]


def change(file: Path, edit):
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content, indent=3))


def exchange_names(content):
    first, second = content["categories"][:2]
    first["name"], second["name"] = second["name"], first["name"]


def other_classes(content):
    for category in content["categories"]:
        category["name"] += "s"


def other_images(content):
    """As many, of the same sizes and boxes."""
    for image in content["images"]:
        image["file_name"] = f"../images/{image['file_name']}"


def test_the_checkpoint_names_classes_and_data(trained):
    found = torch.load(trained / "out" / "model_final.pth", weights_only=True)[ORIGIN]
    record = json.loads((trained / "out" / "training.json").read_text())
    assert found["classes"] == record["classes"] == list(CLASSES)
    assert found["data"] == record["data"] and found["data"].keys() == {"first"}
    first = found["data"]["first"]
    assert (first["images"], first["annotations"], len(first["sha256"])) == (6, 12, 16)
    assert str(trained) not in json.dumps(found)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (exchange_names, "those of the weights in another order (bar, disc, cup instead of disc,"),
        (other_classes, "first has other classes than the weights were trained on (discs, bars,"),
    ],
)
def test_evaluation_refuses_other_classes(run, capsys, edit, sentence):
    change(run / "second.json", edit)
    change(run / "first.json", edit)
    weights = ["MODEL.WEIGHTS", run / "out" / "model_final.pth"]
    error = one_sentence(main, [*words(run, "--eval-only"), *weights], capsys, "train_net.py")
    assert sentence in error


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (exchange_names, "are those of the weights in another order"),
        (
            other_images,
            "the data is not what the checkpoint was trained on (first held 6 images and 12 annot",
        ),
        (lambda content: content["annotations"].pop(), "and holds 6 images and 11 annotations"),
    ],
)
def test_resume_refuses_other_data(run, capsys, edit, sentence):
    change(run / "first.json", edit)
    change(run / "second.json", edit)
    error = one_sentence(main, words(run, "--resume"), capsys, "train_net.py")
    assert sentence in error
    assert torch.load(run / "out" / "model_final.pth", weights_only=True)["iteration"] == 1


def test_resume_takes_the_same_data_from_elsewhere(run):
    """Moved, renamed, its rows in another order, the test set changed."""
    change(run / "first.json", lambda content: content["annotations"].reverse())
    change(run / "second.json", lambda content: content["annotations"].pop())
    (run / "first.json").rename(run / "third.json")
    main(words(run, "--resume", first="third"))
    assert torch.load(run / "out" / "model_final.pth", weights_only=True)["iteration"] == 2


def test_prediction_names_the_classes_of_the_weights(run, tmp_path, capsys):
    pictures = write_pictures(tmp_path / "in", (64, 64))
    zoo = export_run(run / "out", tmp_path / "zoo", name="a")
    for weights in (run / "out" / "model_final.pth", *zoo.glob("*.pkl")):
        out = tmp_path / weights.suffix[1:]
        argv = ["--config-file", run / "out" / "config.yaml", "--input", *pictures]
        argv += ["--output", out, "--confidence-threshold", 0, "MODEL.WEIGHTS", weights]
        predict([str(word) for word in argv])
        forget_program()
        rows = json.loads((out / "predictions.json").read_text())
        assert rows and all(row["category"] == CLASSES[row["category_id"]] for row in rows)
    change(run / "second.json", exchange_names)
    argv += ["--overwrite", "--dataset", f"second={run / 'second.json'},{run / 'images'}"]
    capsys.readouterr()
    error = one_sentence(predict, argv, capsys, "ghm-d2 predict")
    assert "the classes of second are those of the weights in another order" in error


def test_names_in_a_zoo_are_those_of_the_weights(run, tmp_path):
    (weights,) = export_run(run / "out", tmp_path, name="a").glob("*.pkl")
    assert pickle.loads(weights.read_bytes())[ORIGIN]["classes"] == list(CLASSES)
    (run / "out" / "training.json").unlink()
    export_run(run / "out", tmp_path, name="b")
    entries = json.loads((tmp_path / "index.json").read_text())["models"]
    assert [entry["classes"] for entry in entries] == [list(CLASSES)] * 2


@pytest.mark.parametrize("entry", [None, 5, [], {}, {"classes": "disc", "data": {"a": 5}}])
def test_weights_of_others_name_nothing_and_stop_nothing(entry):
    origin = read_origin({"model": {}, ORIGIN: entry})
    assert origin == read_origin({}) == Record()
    check_classes(origin, ("disc",), "x")
    assert changed_data(origin, {"x": {"sha256": "1"}}) == []


def test_long_and_hostile_names_are_shown_cut_and_escaped():
    origin = read_origin({ORIGIN: origin_entry([f"class\x1b{k}" for k in range(500)])})
    with pytest.raises(UserError) as error:
        check_classes(origin, ["a"] * 500, "x")
    assert str(error.value).isprintable() and len(str(error.value)) < 1000
    assert "and 492 more" in str(error.value)


def registered(folder, name, content):
    spec = f"{name}={write(folder / name, name, content)}"
    register_coco_dataset(check_coco_dataset(parse_dataset(spec)))
    return data_fingerprint(name)


def test_fingerprints_differ_where_the_data_does(tmp_path):
    content = coco_content()
    same, moved, named = (copy.deepcopy(content) for _ in range(3))
    same["info"] = {"year": 2000}
    for table in ("images", "annotations", "categories"):
        same[table].reverse()
    moved["annotations"][3]["bbox"][0] += 1
    named["categories"][0]["name"] = "dish"
    found = [registered(tmp_path, f"origin_{i}", x) for i, x in
             enumerate((content, same, moved, named))]  # fmt: skip
    assert found[0] == found[1] and len({x["sha256"] for x in found}) == 3


def test_fingerprint_of_data_that_somebody_else_registered(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("{}")
    MetadataCatalog.get("origin_other").json_file = str(file)
    first = data_fingerprint("origin_other")
    file.write_text("{ }")
    assert data_fingerprint("origin_other") != first and first.keys() == {"sha256"}
    file.unlink()
    assert data_fingerprint("origin_other") == {}
    MetadataCatalog.remove("origin_other")
