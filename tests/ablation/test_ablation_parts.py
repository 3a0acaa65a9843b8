"""The parts of an ablation that train nothing: grids, identities, statistics, report."""

import json
import math

import pytest
import yaml
from detectron2.config import get_cfg

from ghm_d2 import add_ghm_config
from ghm_d2.ablation import TABLES, load_grid, plan_runs
from ghm_d2.ablation.grid import SPEED
from ghm_d2.ablation.noise import plan_with_noise
from ghm_d2.ablation.plan import flat
from ghm_d2.ablation.plot import _references, draw_summary
from ghm_d2.ablation.report import render_markdown, summarize
from ghm_d2.ablation.results import Store, _figures, read_study
from ghm_d2.ablation.stats import mean_and_deviation, paired_difference, t_quantile
from ghm_d2.engine.arguments import parse_arguments
from ghm_d2.engine.setup import load_config
from ghm_d2.errors import UserError
from ghm_d2.modeling import validate_ghm_config
from tests.kinds import Kind
from tests.tiny import RETINANET, ROOT, TINY, coco_content, unregister_all, write_coco


@pytest.fixture(autouse=True)
def clean_up():
    yield
    unregister_all()


# --- statistics ---------------------------------------------------------------------------------


def test_mean_and_deviation_by_hand():
    assert mean_and_deviation([2.0, 4.0, 9.0]) == (5.0, pytest.approx(math.sqrt(13.0)))
    assert mean_and_deviation([3.0]) == (3.0, None)
    assert mean_and_deviation([]) == (None, None)


def test_paired_interval_by_hand():
    """Differences 1, 2, 3: mean 2, deviation 1, half width 4.3027 / sqrt(3)."""
    found = paired_difference({1: 11.0, 2: 22.0, 3: 33.0, 9: 99.0}, {1: 10.0, 2: 20.0, 3: 30.0})
    assert found.seeds == (1, 2, 3) and found.mean == 2.0
    assert found.low == pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-4)
    assert found.high == pytest.approx(2 + 4.30265 / math.sqrt(3), abs=1e-4)
    assert found.verdict == "undecided"


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([1.0, 1.1, 0.9], "better"),
        ([-1.0, -1.1, -0.9], "worse"),
        ([0.0, 0.0], "undecided"),
        ([5.0], "undecided"),
        ([], "not measured"),
        # The interval, not the signs, decides: mean 2, half width 2.48.
        ([1.0, 4.0, 1.0], "undecided"),
    ],
)
def test_verdicts(differences, verdict):
    row = dict(enumerate(differences))
    assert paired_difference(row, {seed: 0.0 for seed in row}).verdict == verdict


def test_t_quantiles_have_their_probability():
    """Integrate Student's density from 0 to the quantile: 0.475."""
    for degrees in (1, 2, 5, 17, 30):
        scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2)
        scale /= math.sqrt(degrees * math.pi)
        steps, end = 20000, t_quantile(degrees)
        width = end / steps
        heights = (
            (1 + ((i + 0.5) * width) ** 2 / degrees) ** (-(degrees + 1) / 2) for i in range(steps)
        )
        assert scale * width * sum(heights) == pytest.approx(0.475, abs=2e-6)
    assert t_quantile(1000) == t_quantile(30)


# --- grids --------------------------------------------------------------------------------------


# The same experiment as a config file of its own.
SAME = {
    ("classification", "cross entropy"): "ce_sl1_retinanet_R_50",
    ("classification", "OHEM"): "ohem_sl1_retinanet_R_50",
    ("classification", "focal loss"): "focal_sl1_retinanet_R_50",
    ("classification", "GHM-C"): "ghm_c_sl1_retinanet_R_50",
    ("regression", "GHM-C + SL1"): "ghm_c_sl1_retinanet_R_50",
    ("regression", "GHM-C + ASL1"): "ghm_c_asl1_retinanet_R_50",
    ("regression", "GHM-C + GHM-R"): "../ghm_retinanet_R_50",
    ("two_stage", "SL1"): "sl1_faster_rcnn_R_50",
    ("two_stage", "GHM-R in the box head"): "ghm_r_box_head_faster_rcnn_R_50",
    ("two_stage", "GHM-R in the RPN"): "ghm_r_rpn_faster_rcnn_R_50",
    ("two_stage", "GHM-R in both"): "ghm_r_both_faster_rcnn_R_50",
}


def merged(file, *overrides):
    cfg = get_cfg()
    add_ghm_config(cfg)
    cfg.merge_from_file(str(file))
    for pairs in overrides:
        cfg.merge_from_list([word for pair in pairs.items() for word in pair])
    validate_ghm_config(cfg)
    return flat(cfg)


def test_the_papers_tables():
    assert TABLES.keys() == {"regions", "density", "classification", "regression", "two_stage"}
    published = {}
    for name, file in TABLES.items():
        grid = load_grid(file)
        assert grid.reference and grid.title and "COCO" in grid.published_on
        for row in grid.rows:
            config = merged(grid.config_file, grid.overrides, row.overrides)
            if (name, row.name) in SAME:
                file = ROOT / "configs" / "baselines" / f"{SAME[name, row.name]}.yaml"
                assert config == merged(file), row.name
            published[name, row.name] = row.published
    assert [published["regions", f"M = {m}"]["AP"] for m in (5, 10, 20, 30, 40)] == [
        33.4, 34.6, 35.2, 35.8, 35.4
    ]  # fmt: skip
    speeds = [published["density", row][SPEED] for row in (
        "cross entropy", "GHM-C, exact density", "GHM-C, unit regions")]  # fmt: skip
    assert speeds == [0.566, 13.675, 0.824]
    assert published["regression", "GHM-C + GHM-R"] == {"AP": 36.4}
    assert published["two_stage", "GHM-R in the box head"] == {"AP": 37.4}


ROW = {"name": "a", "overrides": {"MODEL.GHM.RETINANET.CLS.BINS": 5}}
GOOD = {"config_file": RETINANET, "rows": [ROW]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([1], "holds a list"),
        ({"config_file": RETINANET}, "has no rows"),
        (GOOD | {"rows": []}, "rows must be a list that is not empty"),
        (GOOD | {"colums": ["AP"]}, "unknown field 'colums' (similar: columns)"),
        (GOOD | {"config_file": "none.yaml"}, "config file none.yaml does not exist"),
        (GOOD | {"reference": "b"}, "there is no row 'b'"),
        (GOOD | {"compare": ["a"]}, "compare needs a reference row"),
        (GOOD | {"rows": [ROW, ROW]}, "more than one row is called 'a'"),
        (GOOD | {"columns": "AP"}, "columns must be a list of names"),
        (GOOD | {"rows": [ROW | {"published": {"AP60": 1}}]}, "publishes 'AP60'"),
        (GOOD | {"rows": [ROW | {"published": {"AP": "?"}}]}, "must map columns to numbers"),
        (GOOD | {"rows": [ROW | {"overrides": {"MODEL": {"A": 1}}}]}, "write the whole key"),
        (GOOD | {"rows": [ROW | {"overrides": [1]}]}, "must map config keys to values"),
        (GOOD | {"corrupt": ["missing"]}, "corrupt must map names to shares of errors"),
        (GOOD | {"corrupt": {}}, "corrupt must map names to shares of errors"),
        (GOOD | {"corrupt": {"a": 0.2}}, "corrupt: a must map kinds of errors to shares"),
        (GOOD | {"corrupt": {"a": {"missing": "20 %"}}}, "must map kinds of errors to shares"),
        (
            GOOD | {"corrupt": {"a": {"misssing": 0.2}}},
            "corrupt: a: there is no kind of error 'misssing'",
        ),
        (GOOD | {"corrupt": {"a": {"missing": 20}}}, "the share of 'missing' must lie in"),
        (GOOD | {"rows": [ROW | {"corrupt": {}}]}, "unknown field 'corrupt'"),
    ],
)
def test_mistakes_in_a_grid(content, sentence, tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r".*") as found:
        load_grid(file)
    assert sentence in str(found.value) and str(file) in str(found.value)


def test_broken_yaml(tmp_path):
    (tmp_path / "g.yaml").write_text("a: [")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_grid(tmp_path / "g.yaml")


# --- identities ---------------------------------------------------------------------------------


def plan(
    folder,
    *pairs,
    seeds=(1,),
    names=("first", "second"),
    row=None,
    images=6,
    complete=True,
    **changes,
):
    overrides = {k: list(v) if isinstance(v, tuple) else v for k, v in TINY.items() if k != "SEED"}
    grid = GOOD | {"overrides": overrides, "rows": [ROW if row is None else row]} | changes
    folder.mkdir(exist_ok=True)
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump(grid))
    content = coco_content()
    content["annotations"] = content["annotations"][: 2 * images]
    runs = plan_runs(
        load_grid(file),
        seeds,
        scratch=folder / "log",
        datasets=[f"{name}={write_coco(folder, name, content)}" for name in names],
        pairs=[str(word) for word in pairs],
        complete=complete,
    )
    unregister_all()
    return runs


def test_identity_is_what_decides_the_result(tmp_path):
    (one,) = plan(tmp_path / "a")
    ident = one.id
    # Somewhere else, under other names, on another device: the same run.
    assert plan(tmp_path / "b", names=("x", "y"))[0].id == ident
    assert plan(tmp_path / "a", "MODEL.DEVICE", "cpu", "SOLVER.CHECKPOINT_PERIOD", 1)[0].id == ident
    assert not {"MODEL.DEVICE", "OUTPUT_DIR", "SOLVER.CHECKPOINT_PERIOD"} & one.config.keys()
    default = plan(tmp_path / "a", "MODEL.GHM.SYNC", "False")[0]
    assert default.id == ident
    off = ("MODEL.GHM.RETINANET.REG.ENABLED", False)
    without = plan(tmp_path / "a", *off)[0]
    assert plan(tmp_path / "a", *off, "MODEL.GHM.RETINANET.REG.MU", 0.5)[0].id == without.id
    assert "MODEL.GHM.RETINANET.REG.ENABLED" in without.config
    assert "MODEL.GHM.RETINANET.REG.MU" not in without.config
    other = [
        plan(tmp_path / "a", seeds=(2,))[0].id,
        plan(tmp_path / "a", "SOLVER.BASE_LR", 0.02)[0].id,
        plan(tmp_path / "a", row=ROW | {"overrides": {}})[0].id,
        plan(tmp_path / "c", images=5)[0].id,
        plan(tmp_path / "a", "MODEL.GHM.RETINANET.REG.MU", 0.5)[0].id,
        without.id,
    ]
    assert len({ident, *other}) == 7


def test_plan_is_what_train_net_gets(tmp_path):
    runs = plan(tmp_path / "a", "SOLVER.MAX_ITER", 50, seeds=(3, 1))
    assert [run.seed for run in runs] == [3, 1]
    words = list(runs[0].argv)
    pairs = dict(zip(words, words[1:], strict=False))
    assert pairs["MODEL.GHM.RETINANET.CLS.BINS"] == "5" and pairs["SEED"] == "3"
    assert pairs["SOLVER.MAX_ITER"] == "50" and pairs["SOLVER.CHECKPOINT_PERIOD"] == "5"
    assert pairs["DATASETS.TRAIN"] == "('first',)" and pairs["DATASETS.TEST"] == "('second',)"
    assert words.count("--dataset") == 2 and runs[0].iterations == 50
    assert runs[0].overrides["MODEL.GHM.RETINANET.CLS.BINS"] == 5
    assert runs[0].config["MODEL.RETINANET.NUM_CLASSES"] == 3


def test_plan_of_a_python_config(tmp_path):
    kind = Kind("python", tmp_path)
    row = {"name": "a", "overrides": {"model.ghm_c.bins": 5, "model.ghm_r": None}}
    whole = {"config_file": kind.file, "overrides": {"train.init_checkpoint": "it's a\\b"}}
    arguments = whole | {"row": row}
    (run,) = plan(tmp_path / "a", "train.max_iter=50", **arguments, complete=False)
    settings, words = run.config, run.argv_into(tmp_path / "o")
    assert settings["model.ghm_c.bins"] == 5 and settings["model.ghm_r"] is None
    assert settings["model._target_"] == "ghm_d2.modeling.GHMRetinaNet"
    assert settings["model.num_classes"] == 3 and settings["train.seed"] == 1
    assert run.iterations == 50 and run.weights == {"name": "it's a\\b"}
    parsed = parse_arguments(words)
    again = load_config(parsed.config_file, parsed.opts)
    assert again.train.output_dir == str(tmp_path / "o") and again.model.ghm_r is None
    assert again.train.init_checkpoint == "it's a\\b" and again.train.checkpointer.period == 5
    assert again.dataloader.train.dataset.names == ["first"]
    assert again.dataloader.test.dataset.names == ["second"]
    assert parsed.dataset == [word for word in words if word.startswith(("first=", "second="))]

    def ident(*pairs, **changes):
        return plan(tmp_path / "b", *pairs, complete=False, **arguments | changes)[0].id

    base = ident("train.max_iter=50", names=("x", "y"))
    assert base == run.id == ident("train.max_iter=50", "train.checkpointer.period=1")
    others = [ident(), ident("train.max_iter=50", "optimizer.lr=0.1"), ident(seeds=(2,))]
    others.append(ident("train.max_iter=50", row={"name": "a"}))
    assert len({base, *others}) == 5
    for changes, sentence in (
        ({"row": row | {"config_file": RETINANET}}, "are not both YAML"),
        ({"overrides": {"train.seed": 3}}, "use --seeds instead"),
        ({"overrides": {"SEED": 3}}, "unknown key SEED"),
    ):
        with pytest.raises(UserError, match=sentence):
            ident(**changes)
        unregister_all()
    with pytest.raises(UserError, match="cannot be set for all runs: it is what row 'a'"):
        ident("model.ghm_c.bins=7")


NOISY = {"clean": {}, "noisy": {"wrong class": 0.5, "missing": 0.25}}


def plan_noisy(folder, rows, seeds, **changes):
    """The runs of a grid with noise; each row another number of regions."""
    rows = [{"name": n, "overrides": {"MODEL.GHM.RETINANET.CLS.BINS": m}} for n, m in rows.items()]
    overrides = {k: list(v) if isinstance(v, tuple) else v for k, v in TINY.items() if k != "SEED"}
    content = GOOD | {"overrides": overrides, "rows": rows, "corrupt": NOISY} | changes
    folder.mkdir(exist_ok=True)
    (folder / "g.yaml").write_text(yaml.safe_dump(content))
    grid = load_grid(folder / "g.yaml")
    sets = [f"{name}={write_coco(folder, name)}" for name in ("first", "second")]

    def part(grid, seeds, datasets):
        return plan_runs(grid, seeds, datasets=datasets, scratch=folder / "log", complete=False)

    return grid, plan_with_noise(part, grid, seeds, sets, folder / "noise")


def test_rows_on_copies_with_errors(tmp_path):
    rows = {"a": 5, "b": 6}
    grid, runs = plan_noisy(tmp_path / "a", rows, (3, 1), reference="a")
    names = ["a, clean", "b, clean", "a, noisy", "b, noisy"]
    assert [row.name for row in grid.rows] == names
    assert grid.compare == {"b, clean": "a, clean", "b, noisy": "a, noisy"}
    assert [(run.row, run.seed) for run in runs] == [(n, s) for s in (3, 1) for n in names]
    assert len({run.id for run in runs}) == 8
    # One copy for each seed; what is not corrupted is the run that a grid without noise has.
    train = {(run.row, run.seed): run.data["train"] for run in runs}
    assert train["a, noisy", 3] == train["b, noisy", 3]
    contents = [set(train["a, noisy", seed].values()) for seed in (3, 1)]
    assert contents[0] != contents[1]
    assert train["a, clean", 3] == train["a, clean", 1] and list(train["a, clean", 1]) == ["first"]
    assert len({json.dumps(run.data["test"]) for run in runs}) == 1
    unregister_all()
    _, plain = plan_noisy(tmp_path / "a", rows, (3, 1), corrupt=None)
    assert {run.id for run in plain} == {run.id for run in runs if "clean" in run.row}
    unregister_all()
    # The copy is what the training gets, and the same after a kill or in another folder.
    text = next(word for word in runs[2].argv if word.startswith("first_"))
    name, _, where = text.partition("=")
    assert f"('{name}',)" in runs[2].argv and name == "first_wrong_class_50_missing_25_seed_3"
    file = tmp_path / "a" / "noise" / f"{name}.json"
    noisy = json.loads(file.read_text())
    assert where == f"{file},{tmp_path / 'a' / 'images'}"
    true = {row["id"]: row["category_id"] for row in coco_content()["annotations"]}
    assert len(noisy["annotations"]) == 9
    assert sum(true[row["id"]] != row["category_id"] for row in noisy["annotations"]) == 6
    changes = json.loads(file.with_name(f"{name}.changes.json").read_text())
    assert sorted(row["kind"] for row in changes) == ["missing"] * 3 + ["wrong class"] * 6
    before = file.read_bytes()
    for folder in ("a", "b"):
        assert [r.id for r in plan_noisy(tmp_path / folder, rows, (3, 1))[1]] == [
            run.id for run in runs
        ]
        unregister_all()
    assert file.read_bytes() == before
    with pytest.raises(UserError, match="corrupt makes copies of the first --dataset"):
        plan_with_noise(lambda *_: [], grid, (1,), [], tmp_path)


def stored(run, **changes):
    result = {"config": run.config, "weights": run.weights, "metrics": {"AP": 1.0}}
    return result | changes


def test_a_stored_run_with_another_default_is_done_again(tmp_path, caplog):
    (run,) = plan(tmp_path / "a")
    store = Store(tmp_path / "out")
    file = store.runs / f"{run.id}.json"
    assert store.load(run) is None
    # A key that has come since: nothing has changed.
    older = {k: v for k, v in run.config.items() if k != "MODEL.GHM.SYNC"}
    file.write_text(json.dumps(stored(run, config=older)))
    assert store.load(run)["metrics"] == {"AP": 1.0}
    changed = run.config | {"MODEL.GHM.RETINANET.REG.MU": 0.5}
    file.write_text(json.dumps(stored(run, config=changed)))
    assert store.load(run) is None
    assert "MODEL.GHM.RETINANET.REG.MU 0.5 instead of 0.02" in caplog.text
    file.write_text("{")
    assert store.load(run) is None and "is not a complete JSON file" in caplog.text


def test_weights_are_known_by_their_content(tmp_path, caplog):
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"one")
    (run,) = plan(tmp_path / "a", "MODEL.WEIGHTS", weights)
    assert run.config["MODEL.WEIGHTS"] == "w.pth" and len(run.weights["sha256"]) == 64
    store = Store(tmp_path / "out")
    file = store.runs / f"{run.id}.json"
    file.write_text(json.dumps(stored(run)))
    assert store.load(run)
    file.write_text(json.dumps(stored(run, weights={"name": "w.pth", "sha256": "0"})))
    assert store.load(run) is None and "other weights (w.pth)" in caplog.text


def test_a_study_keeps_every_run_whole(tmp_path, caplog):
    """Runs of other rows stay, types too (True is not 1), and the file does not depend on order."""
    (run,) = plan(tmp_path / "a")
    store = Store(tmp_path / "out")
    few = {k: v for k, v in run.config.items() if k != "MODEL.GHM.SYNC"}
    configs = [run.config, run.config | {"SEED": True}, run.config | {"SEED": 1.0}, few]
    named = {
        f"id{i}": stored(run, config=config, id=f"id{i}", row=f"row {i}", seed=1)
        for i, config in enumerate(configs)
    }
    first = dict(list(named.items())[:2])
    store.write_study({"grid": "g", "seeds": [1]}, first)
    file = store.write_study({"grid": "g", "seeds": [1, 2]}, dict(list(named.items())[2:]))
    found = {one["id"]: one for one in read_study(file)}
    assert found == named and [type(found[k]["config"]["SEED"]) for k in named] == [
        int, bool, float, int
    ]  # fmt: skip
    content = json.loads(file.read_text())
    assert content["seeds"] == [1, 2] and len(content["runs"]) == 4
    text = file.read_text()
    assert sum('"id": "id' in line for line in text.splitlines()) == 4  # one run a line
    again = store.write_study({"grid": "h", "seeds": [1, 2]}, dict(reversed(list(named.items()))))
    assert again.read_text() == text.replace('"grid": "g"', '"grid": "h"')
    # The study's file is enough to know its runs, whatever the grid is called that asks.
    file.with_name("other.json").write_text('{"no": "study"}')
    stored_run = stored(run, id=run.id, row="a", seed=1)
    store.write_study({"grid": "i"}, {run.id: stored_run})
    assert Store(tmp_path / "out").load(run) == stored_run
    file.write_text(text[:-20])
    with pytest.raises(UserError, match="a study is damaged: .*g.json is not a complete JSON file"):
        Store(tmp_path / "out").load(run)
    with pytest.raises(UserError, match="is damaged"):
        store.write_study({"grid": "g"}, named)
    assert file.read_text() == text[:-20]


def test_data_drawn_on_first_use_has_a_fingerprint(tmp_path, monkeypatch):
    """In a fresh clone the default data set is not there yet."""
    monkeypatch.chdir(tmp_path)
    quick = str(ROOT / "configs" / "quickstart" / "ghm_retinanet_quickstart.yaml")
    file = tmp_path / "g.yaml"
    file.write_text(yaml.safe_dump({"config_file": quick, "rows": [{"name": "a"}]}))
    arguments = {"scratch": tmp_path / "log", "pairs": ["MODEL.DEVICE", "cpu"], "complete": False}
    (run,) = plan_runs(load_grid(file), [1], **arguments)
    assert list(run.data["train"]) == ["ghm_synthetic_train"] and run.data["test"]
    name = "coco_2017_val_100"
    arguments["pairs"] += ["DATASETS.TEST", f"('{name}',)"]
    with pytest.raises(UserError, match=f"the data set {name} cannot be read"):
        plan_runs(load_grid(file), [1], **arguments)


def test_figures_of_the_first_data_set_have_no_prefix():
    both = {"a/bbox/AP": 30.0, "a/bbox/AP-cup": None, "b/bbox/AP": 20.0}
    assert _figures(both, "a") == ({"AP": 30.0, "AP-cup": None, "b/bbox/AP": 20.0}, False)
    nothing = {"bbox/AP": None, "bbox/AP50": None, "bbox/APs": None}
    assert _figures(nothing, "a") == ({"AP": 0.0, "AP50": 0.0, "APs": None}, True)


# --- report -------------------------------------------------------------------------------------


@pytest.fixture
def summary(tmp_path):
    rows = [
        {"name": "SL1", "published": {"AP": 35.8, SPEED: 0.5}},
        {"name": "GHM-R", "published": {"AP": 36.4}, "note": "mu 0.02"},
        {"name": "none"},
    ]
    content = GOOD | {
        "rows": rows,
        "reference": "SL1",
        "columns": ["AP", "AP50", "AP90"],
        "published_on": "COCO",
        "title": "Boxes",
    }
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(content))
    grid = load_grid(tmp_path / "g.yaml")
    runs, results = [], {}
    base = plan(tmp_path / "plan")[0]
    for row, values in (("SL1", (30.0, 32.0, 34.0)), ("GHM-R", (31.0, 33.1, 34.9))):
        for seed, value in enumerate(values, start=1):
            ident = f"{row}{seed}"
            runs.append(type(base)(**{**vars(base), "id": ident, "row": row, "seed": seed}))
            results[ident] = {
                "metrics": {"AP": value, "AP50": 2 * value, "AP90": None},
                "nothing_detected": False,
                SPEED: 0.1 * seed,
                "peak_rss_mb": 700.0 + seed,
                "peak_gpu_mb": None,
                "iterations": 40,
                "data": base.data,
                "gpu": None,
                "cpu": "a processor",
                "threads": 1,
                "versions": {"torch": "2", "detectron2": "0"},
                "commit": "0123456789abcdef",
                "starts": seed,
            }
    runs += [
        type(base)(**{**vars(base), "id": f"n{seed}", "row": "none", "seed": seed})
        for seed in (1, 2)
    ]
    return summarize(grid, runs, results, {"n1": "no lamp"})


def test_report_says_what_was_measured(summary):
    text = render_markdown(summary)
    assert "# Boxes" in text
    header, _, first, second, third = [x for x in text.splitlines() if x.startswith("|")][:5]
    assert header == (
        "|  | seeds | AP | AP50 | AP90 | s/iteration | peak memory (MB) | AP, published | "
        "s/iteration, published |"
    )
    assert first == "| SL1 | 3 | 32.0 ± 2.0 | 64.0 ± 4.0 |  | 0.200 ± 0.100 | 703 | 35.8 | 0.5 |"
    assert second == "| GHM-R | 3 | 33.0 ± 2.0 | 66.0 ± 3.9 |  | 0.200 ± 0.100 | 703 | 36.4 |  |"
    assert third == "| none | 0 |  |  |  |  |  |  |  |"
    # Differences 1.0, 1.1, 0.9: deviation 0.1, half width 0.248.
    assert "|  | pairs | difference in AP (95 % interval) | verdict | AP50 | AP90 |" in text
    assert "| GHM-R | 3 | +1.00 (+0.75 ... +1.25) | better | +2.00 (+1.50 ... +2.50) |  |" in text
    assert "| none | 0 |  | not measured |  |  |" in text
    assert "- GHM-R: mu 0.02" in text and "Published: COCO; not measured here" in text
    assert "- none, seed 1: no lamp" in text and "1 not done: none (seed 2)." in text
    assert "4 runs were cut off" in text and "commit 0123456789" in text
    assert json.loads(json.dumps(summary))["comparisons"][0]["verdict"] == "better"


def test_rows_are_compared_on_the_same_data(tmp_path):
    """A clean reference of 10 and a noisy one of 20: each row against its own."""
    grid, runs = plan_noisy(tmp_path, {"a": 5, "b": 6}, (1, 2), reference="a")
    values = {"a, clean": 10.0, "b, clean": 11.0, "a, noisy": 20.0, "b, noisy": 18.0}
    more = {SPEED: None, "peak_rss_mb": None, "peak_gpu_mb": None, "gpu": None, "cpu": None}
    more |= {"nothing_detected": False, "iterations": 2, "threads": 1, "versions": {}, "starts": 1}
    results = {
        run.id: more
        | {"metrics": {"AP": values[run.row] + run.seed}, "commit": "0", "data": run.data}
        for run in runs
    }
    summary = summarize(grid, runs, results, {})
    found = {
        (item["row"], item["reference"]): item["mean"]
        for item in summary["comparisons"]
        if item["column"] == "AP"
    }
    assert found == {("b, clean", "a, clean"): 1.0, ("b, noisy", "a, noisy"): -2.0}
    text = render_markdown(summary)
    assert "## Compared with a, each on the same data" in text
    assert text.count("test second (") == 1
    ends = list(_references(summary, "AP"))
    assert ends == [(11.5, (-0.4, 1.4)), (21.5, (1.6, 3.4))]


def tuned(summary):
    """The summary with tries: of two rows complete, the second with one that failed."""

    def row(complete, chosen, *tries):
        values = [dict(zip(("A.CLS.W", "B.LR"), v, strict=True)) for *v, _ in tries]
        tries = [{"values": v, "score": t[-1]} for v, t in zip(values, tries, strict=True)]
        return {"complete": complete, "chosen": values[chosen] if tries else {}, "tries": tries}

    record = {
        "tries": 3,
        "keys": {"A.CLS.W": 2.0, "B.LR": 1.5},
        "seeds": [8, 9],
        "column": "AP",
        "images": {"rest": 30, "held_out": 10},
        "rows": {
            "SL1": row(True, 1, (1.0, 0.1, 30.04), (2.0, 0.1, 32.0), (0.5, 0.1, 28.0)),
            "GHM-R": row(True, 0, (4.0, 0.1, 33.0), (8.0, 0.1, None), (2.0, 0.1, 31.0)),
            "none": row(False, 0, (1.0, 0.1, None)),
            "new": row(False, 0),
        },
    }
    return summary | {"tuning": record}


def test_report_says_what_was_tried(summary):
    text = render_markdown(tuned(summary))
    assert "| SL1 | 3 | 30.0 | 32.0 | 2 (highest) | 0.1 |" in text
    assert "| GHM-R | 3 | 33.0 | 33.0 | 4 | 0.1 |" in text
    assert "| none | 1 of 3 | failed | failed | 1 | 0.1 |" in text
    assert "| new | 0 of 3 |  |  |  |  |" in text
    assert "Every try (CLS.W, B.LR: AP):" in text
    assert "\n- GHM-R: 4, 0.1: 33.0; 8, 0.1: failed; 2, 0.1: 31.0\n" in text
    assert "3 tries (CLS.W by 2, B.LR by 1.5), seed 8, 9, trained on 30 of" in text
    assert "Rows with fewer tries are not tuned yet" in text
    assert "planned: 1, 2, 3." in text and "planned" not in render_markdown(summary | {"seeds": []})


def test_picture_in_both_formats(summary, tmp_path):
    summary = tuned(summary)
    files = draw_summary(summary, tmp_path / "plot")
    again = draw_summary(summary, tmp_path / "again")
    assert [f.read_bytes() for f in files] == [f.read_bytes() for f in again]
    assert [f.suffix for f in files] == [".png", ".svg"]
    assert files[0].read_bytes().startswith(b"\x89PNG") and b"<svg" in files[1].read_bytes()
    # A row without a figure is in it as well.
    assert all(f"<!-- {name} -->" in files[1].read_text() for name in ("SL1", "none", "tries"))
