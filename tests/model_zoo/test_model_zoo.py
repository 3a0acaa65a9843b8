"""ghm_d2.model_zoo: configs and weights by name, every file checked before it is opened."""

import functools
import hashlib
import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager

from ghm_d2 import model_zoo
from ghm_d2.errors import UserError
from ghm_d2.files import write_json
from ghm_d2.model_zoo import ZooError, zoo
from ghm_d2.model_zoo.export import write_weights
from ghm_d2.model_zoo.zoo import read_index
from tests.detectors import small_config, small_model
from tests.tiny import ROOT, ZOO_ENTRY

CONFIG = "ghm_retinanet_R_50"


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def add_model(folder, name, model_id, seed):
    """Put a small model into a zoo; returns it."""
    model = small_model(CONFIG, seed=seed)
    target = folder / name / str(model_id)
    target.mkdir(parents=True)
    weights = write_weights(
        {k: v for k, v in model.state_dict().items() if "ghm_" not in k}, target
    )
    (target / "config.yaml").write_text(small_config(CONFIG, "SEED", 100 + model_id).dump())
    file = folder / "index.json"
    index = json.loads(file.read_text()) if file.exists() else {"models": []}
    index["models"].append(
        {
            "name": name,
            "id": model_id,
            "weights": weights.name,
            "md5": hashlib.md5(weights.read_bytes()).hexdigest(),
            "sha256": sha256(weights),
            "config_sha256": sha256(target / "config.yaml"),
        }
    )
    write_json(file, index)
    return model


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A zoo in a folder, with two models of one name; GHM_D2_ZOO names it."""
    folder = tmp_path / "zoo"
    monkeypatch.setenv("GHM_D2_ZOO", str(folder))
    return folder


def same_weights(model, other):
    a, b = model.state_dict(), other.state_dict()
    return all(torch.equal(a[k], b[k]) for k in a if "ghm_" not in k)


# --- configs ------------------------------------------------------------------------------------


def test_config_files_of_the_checkout(monkeypatch):
    monkeypatch.delenv("GHM_D2_ZOO", raising=False)
    for file in (ROOT / "configs").rglob("*.yaml"):
        name = file.relative_to(ROOT / "configs").as_posix()
        assert Path(model_zoo.get_config_file(name)) == file
    cfg = model_zoo.get_config("quickstart/ghm_retinanet_quickstart.yaml")
    assert cfg.MODEL.GHM.RETINANET.REG.MU == 0.1 and cfg.SOLVER.MAX_ITER == 700


def test_unknown_config_is_a_runtime_error_as_in_detectron2(monkeypatch):
    monkeypatch.delenv("GHM_D2_ZOO", raising=False)
    with pytest.raises(RuntimeError, match=r"R_51.yaml is not available.*similar: .*R_50.yaml"):
        model_zoo.get_config_file("ghm_retinanet_R_51.yaml")
    with pytest.raises(ValueError, match=r"R_51.yaml are not available.*similar: .*R_50.yaml"):
        model_zoo.get_checkpoint_url("ghm_retinanet_R_51.yaml")


def test_no_zoo(monkeypatch):
    """What is published elsewhere names the conversion; what has no weights has none."""
    monkeypatch.setenv("GHM_D2_ZOO", "")
    with pytest.raises(
        ZooError, match=r"fpn_1x_coco_20200130-a437fda3.pth.*ghm-d2 convert-mmdet C"
    ):
        model_zoo.get_checkpoint_url("mmdet/ghm_retinanet_R_50.yaml")
    with pytest.raises(ZooError, match="trained weights of ghm_retinanet_R_50.yaml are not avail"):
        model_zoo.get("ghm_retinanet_R_50.yaml", trained=True)


def test_listed_but_no_zoo(monkeypatch, tmp_path):
    add_model(tmp_path, CONFIG, 1, seed=0)
    index = read_index(tmp_path / "index.json") | {"published": []}
    write_json(tmp_path / "index.json", index)
    monkeypatch.setattr("ghm_d2.model_zoo.model_zoo.PACKAGED_INDEX", tmp_path / "index.json")
    monkeypatch.delenv("GHM_D2_ZOO", raising=False)
    with pytest.raises(ZooError, match="set GHM_D2_ZOO to the folder or URL of one that holds"):
        model_zoo.get_checkpoint_url(f"{CONFIG}.yaml")


# --- a zoo in a folder --------------------------------------------------------------------------


def test_newest_model_of_a_folder(own):
    add_model(own, CONFIG, 12, seed=1)
    newest = add_model(own, CONFIG, 101, seed=2)
    add_model(own, "other", 7, seed=3)
    url = model_zoo.get_checkpoint_url(f"{CONFIG}.yaml")
    assert Path(url).parent == own / CONFIG / "101" and url.endswith(".pkl")
    cfg = model_zoo.get_config(f"{CONFIG}.yaml", trained=True)
    assert (cfg.SEED, cfg.MODEL.WEIGHTS) == (201, url)
    # The config that trained, not the one of configs/ that carries its name.
    assert cfg.MODEL.FPN.OUT_CHANNELS == 16
    assert model_zoo.get_config(f"{CONFIG}.yaml").MODEL.FPN.OUT_CHANNELS == 256
    model = model_zoo.get(f"{CONFIG}.yaml", trained=True, device="cpu")
    assert model.training and type(model).__name__ == "GHMRetinaNet"
    assert same_weights(newest, model)
    # A name that configs/ does not have.
    assert model_zoo.get_config_file("other.yaml") == str(own / "other" / "7" / "config.yaml")
    with pytest.raises(ZooError, match=r"othr.yaml is not available.*similar: other.yaml"):
        model_zoo.get_config_file("othr.yaml")


def test_untrained_model_has_no_weights_of_the_zoo(own, tmp_path, monkeypatch):
    trained = add_model(own, CONFIG, 1, seed=1)
    file = tmp_path / "small.yaml"
    file.write_text(small_config(CONFIG).dump())
    monkeypatch.setattr("ghm_d2.config_files.configs_folder", lambda: tmp_path)
    model = model_zoo.get("small.yaml", device="cpu")
    assert model.training and not same_weights(trained, model)


@pytest.mark.parametrize("name", ["weights", "config"])
def test_changed_file_is_not_opened(own, monkeypatch, name):
    add_model(own, CONFIG, 1, seed=1)
    (file,) = (own / CONFIG / "1").glob("*.pkl" if name == "weights" else "config.yaml")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr("pickle.load", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(ZooError, match=f"{file.name} is not the file.*was not opened"):
        model_zoo.get(f"{CONFIG}.yaml", trained=True, device="cpu")
    file.unlink()
    with pytest.raises(ZooError, match=f"{file.name}, which the index lists, cannot be read"):
        model_zoo.get_config(f"{CONFIG}.yaml", trained=True)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        ("{", "not a complete JSON file"),
        ("[]", 'has no list "models"'),
        ('{"models": [3]}', 'has no list "models"'),
        ({"name": "../../out"}, "the name of a model is '../../out'"),
        ({"name": "/etc/x"}, "the name of a model is '/etc/x'"),
        ({"name": "a//b"}, "the name of a model is 'a//b'"),
        ({"weights": "../x.pkl"}, "the weights of a model is '../x.pkl'"),
        ({"sha256": None}, "the sha256 of a model is None"),
        ({"id": "1"}, "the id of a/b is '1'"),
        ({"id": 0}, "the id of a/b is 0"),
    ],
    ids=str,
)
def test_invalid_index(own, content, sentence):
    """Its names become paths, so none may lead out of the zoo or of the cache."""
    own.mkdir()
    if isinstance(content, dict):
        content = json.dumps({"models": [ZOO_ENTRY | content]})
    if content is not None:
        (own / "index.json").write_text(content)
    with pytest.raises(UserError) as error:
        model_zoo.get_checkpoint_url("a/b.yaml")
    assert sentence in str(error.value) and "\n" not in str(error.value)


# --- a zoo behind a URL -------------------------------------------------------------------------


@pytest.fixture
def served(own, tmp_path, monkeypatch):
    """The zoo over HTTP, an empty cache; returns (folder, URL, paths asked for)."""
    add_model(own, CONFIG, 1, seed=1)
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    serve = functools.partial(Handler, directory=str(own))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("GHM_D2_ZOO", url + "/")
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    before = PathManager._path_handlers.copy()
    yield own, url, asked
    PathManager._path_handlers = before
    server.shutdown()
    server.server_close()


def cached(tmp_path):
    (file,) = (tmp_path / "cache").rglob("*.pkl")
    return file


def test_download_and_cache(served, tmp_path):
    folder, prefix, asked = served
    (weights,) = (folder / CONFIG / "1").glob("*.pkl")
    url = model_zoo.get_checkpoint_url(f"{CONFIG}.yaml")
    assert url == f"{prefix}/{CONFIG}/1/{weights.name}" and asked == ["/index.json"]
    model = model_zoo.get(f"{CONFIG}.yaml", trained=True, device="cpu")
    assert same_weights(small_model(CONFIG, seed=1), model)
    assert sha256(cached(tmp_path)) == sha256(weights)
    model_zoo.get(f"{CONFIG}.yaml", trained=True, device="cpu")
    assert sum(path.endswith((".pkl", ".yaml")) for path in asked) == 2  # each of them once
    assert model_zoo.get_config_file(f"{CONFIG}.yaml") == str(ROOT / "configs" / f"{CONFIG}.yaml")


def test_damaged_cache_is_fetched_again(served, tmp_path):
    folder, _, _ = served
    url = model_zoo.get_checkpoint_url(f"{CONFIG}.yaml")
    PathManager.get_local_path(url)
    right = cached(tmp_path).read_bytes()
    cached(tmp_path).write_bytes(right[:-1])
    assert Path(PathManager.get_local_path(url)).read_bytes() == right


def test_changed_download_is_not_opened(served, tmp_path, monkeypatch):
    folder, _, _ = served
    (weights,) = (folder / CONFIG / "1").glob("*.pkl")
    weights.write_bytes(b"other bytes")
    url = model_zoo.get_checkpoint_url(f"{CONFIG}.yaml")
    monkeypatch.setattr("pickle.load", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(ZooError, match="not the file that the index records.*was not opened"):
        DetectionCheckpointer(torch.nn.Identity()).load(url)
    assert not list((tmp_path / "cache").rglob("*.pkl"))


def test_release_outranks_a_mirror(served, tmp_path, monkeypatch):
    """A mirror that changed file and index together is found out by the packaged index."""
    folder, _, _ = served
    packaged = tmp_path / "packaged.json"
    shutil.copy(folder / "index.json", packaged)
    monkeypatch.setattr(zoo, "PACKAGED_INDEX", packaged)
    (weights,) = (folder / CONFIG / "1").glob("*.pkl")
    weights.write_bytes(b"other bytes")
    index = read_index(folder / "index.json")
    index["models"][0]["sha256"] = sha256(weights)
    write_json(folder / "index.json", index)
    with pytest.raises(ZooError, match="not the file that the index records"):
        PathManager.get_local_path(model_zoo.get_checkpoint_url(f"{CONFIG}.yaml"))


def test_what_the_index_does_not_list_is_not_fetched(served):
    folder, prefix, asked = served
    (folder / "more.pkl").write_bytes(b"x")
    zoo.register_zoo()  # as the import does
    with pytest.raises(ZooError, match=r"more.pkl is not listed in http.*/index.json"):
        PathManager.get_local_path(f"{prefix}/more.pkl")
    assert "/more.pkl" not in asked


def test_zoo_that_cannot_be_reached(served, monkeypatch):
    folder, prefix, _ = served
    (folder / "index.json").unlink()
    with pytest.raises(ZooError, match=r"/index.json cannot be fetched \(HTTP Error 404"):
        model_zoo.get_checkpoint_url(f"{CONFIG}.yaml")
    monkeypatch.setenv("GHM_D2_ZOO", "s3://bucket/zoo")
    with pytest.raises(ZooError, match="must be a folder or start with http:// or https://"):
        model_zoo.get_checkpoint_url(f"{CONFIG}.yaml")
