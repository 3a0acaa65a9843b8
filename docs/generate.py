"""The parts of the documentation that are made from code and measurements, to be never stale.

conf.py calls :func:`write_all` before every build; the pages include what it writes.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ghm_d2.files import read_json, write_text
from ghm_d2.markdown import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Record = dict[str, Any]


def write_all(folder: Path) -> None:
    """Writes every generated part into `folder`."""
    parts = {
        "configuration": configuration(),
        "performance": performance(RESULTS),
        "audit": audit(RESULTS),
        "studies": list_of_studies(RESULTS),
        **{f"study_{file.parent.name}": study(file) for file in reports(RESULTS)},
    }
    for name, text in parts.items():
        write_text(folder / f"{name}.md", text)


# --- configuration ------------------------------------------------------------------------------


def configuration() -> str:
    """Every key of `ghm_d2/config.py` with its default and the comment that stands above it.

    Raises:
        ValueError: a key has no comment.
    """
    from detectron2.config import get_cfg

    from ghm_d2 import add_ghm_config

    stock, cfg = get_cfg(), get_cfg()
    add_ghm_config(cfg)
    known = dict(leaves(stock))
    comments = comments_by_target((ROOT / "ghm_d2" / "config.py").read_text(encoding="utf-8"))
    sections: dict[str, list[tuple[str, str, str]]] = {}
    for key, value in leaves(cfg):
        if key not in known:
            node, _, name = key.rpartition(".")
            row = (f"`{name}`", f"`{value!r}`", comment_of(key, comments))
            sections.setdefault(node, []).append(row)
    text = ""
    for node, rows in sections.items():
        about = [comments.get(f"cfg.{node}"), *inherited(node, comments)]
        text += f"## `{node}`\n\n"
        text += "".join(f"{sentence}\n\n" for sentence in about if sentence)
        text += markdown_table(("key", "default", "meaning"), rows) + "\n\n"
    return text


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf of a config."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def comments_by_target(source: str) -> dict[str, str]:
    """What stands above each assignment: "cfg.MODEL.GHM.SYNC" or "node.BINS" -> comment."""
    lines = source.splitlines()
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            above = []
            for line in reversed(lines[: node.lineno - 1]):
                if not (comment := re.fullmatch(r"\s*# ?(.*)", line)):
                    break
                above.append(comment.group(1))
            if above:
                found[ast.unparse(node.targets[0])] = " ".join(reversed(above))
    return found


def inherited(key: str, comments: dict[str, str]) -> Iterator[str]:
    """Comments in the functions that make such nodes; "node.REG.MU" stands for any ...REG.MU."""
    parts = key.split(".")
    for start in range(len(parts)):
        end = ".".join(parts[start:])
        for target, comment in comments.items():
            variable, _, rest = target.partition(".")
            if variable != "cfg" and rest == end:
                yield comment


def comment_of(key: str, comments: dict[str, str]) -> str:
    """The comment of one key: its own, or else that in the function that makes its node."""
    comment = comments.get(f"cfg.{key}") or next(inherited(key, comments), None)
    if comment is None:
        raise ValueError(f"{key} has no comment above its line in ghm_d2/config.py")
    # A name in capitals or quotes is one to type: show it as code.
    comment = comment.replace("|", r"\|")
    return re.sub(r'"[^"]*"|\b[A-Z]+[A-Z0-9]*[_.][A-Z0-9_.]*[A-Z0-9]\b', r"`\g<0>`", comment)


# --- performance --------------------------------------------------------------------------------


def performance(folder: Path) -> str:
    """Tables of every measurement of speed and memory in `folder`."""
    renderers = {
        "bench_losses": losses_section,
        "bench_train_step": train_step_section,
        "kernel_code": kernel_section,
    }
    text = ""
    for stem, render in renderers.items():
        for file in sorted(folder.glob(f"{stem}*.json")):
            text += render(file, read_json(file)) + "\n"
    return text


def source(file: Path, record: Record) -> str:
    """Where a section's figures come from."""
    place, versions = record.get("machine", record), record.get("versions", record)
    units = {"cpu": "", "threads": " thread(s)"}
    processor = ", ".join(f"{place[key]}{unit}" for key, unit in units.items() if key in place)
    where = place.get("gpu") or processor
    return (
        f"From `{file.relative_to(ROOT)}`: {where}; PyTorch {versions['torch']}; "
        f"commit `{record['commit'][:10]}`.\n\n"
    )


def losses_section(file: Path, record: Record) -> str:
    """Time and memory of the losses."""
    titles = {
        "sizes": "Classification, by the number of logits",
        "regions": "Classification, by the number of unit regions",
        "levels": "Classification of whole images, all FPN levels",
        "ghm_r": "Box regression, by the number of coordinates",
    }
    text = f"## Losses ({record['settings']['device']})\n\n{source(file, record)}"
    text += f"{record['measured'].capitalize()}. Extra memory is the peak above what was there "
    text += "before the call, over the bytes of the predictions.\n\n"
    picture = file.with_suffix(".png")
    if picture.exists():
        text += f"![Time of the losses]({relative(picture)})\n\n"
    for suite in dict.fromkeys(cell["suite"] for cell in record["cells"]):
        cells = [cell for cell in record["cells"] if cell["suite"] == suite]
        text += f"### {titles.get(suite, suite)}\n\n"
        head = ("case", "loss", "median", "quartiles", "extra memory")
        text += markdown_table(head, map(losses_row, cells)) + "\n\n"
    return text


def losses_row(cell: Record) -> list[str]:
    start = [cell["case"], cell["row"]]
    if cell["status"] != "measured":
        return [*start, f"{cell['status']}: {cell.get('reason', '')}", "", ""]
    median, low, high = (duration(cell[key]) for key in ("median_s", "q1_s", "q3_s"))
    return [*start, median, f"{low} to {high}", f"{cell['peak_times_predictions']:.1f}"]


def train_step_section(file: Path, record: Record) -> str:
    """A whole training step and inference against stock Detectron2."""
    settings = record["settings"]
    text = f"## Whole step ({settings['device']})\n\n{source(file, record)}"
    height, width = settings["size"]
    text += f"ResNet-{settings['depth']}, {settings['batch']} image(s) of {height} x {width}, "
    text += f"{settings['rounds']} rounds of each; {record['measured']}.\n\n"
    rows = []
    for model, phases in record["models"].items():
        for phase, result in phases.items():
            ratio = result["time_ghm_over_stock"]
            times = [duration(result[kind]["median_s"]) for kind in ("stock", "ghm")]
            interval = f"{ratio['ratio']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"
            memory = f"{result['memory_ghm_over_stock']:.2f}"
            rows.append([model.replace("_", " "), phase, *times, interval, memory])
    head = ("detector", "", "stock", "GHM", "time, GHM / stock (95 %)", "memory, GHM / stock")
    return text + markdown_table(head, rows) + "\n"


WIDTHS = ("loads", "stores")
# What a RetinaNet step launches over its tensors, in either precision.
LAUNCHED = (
    ("float32", ("count-negative", "loss+gradient-negative", "scale")),
    (
        "float16",
        ("count-negative", "loss-negative", "gradient-class"),
    ),
)
LAUNCHED_FOR_BOXES = ("count-delta", "loss+gradient-delta", "loss-delta", "gradient-delta")


def kernel_section(file: Path, record: Record) -> str:
    """The machine code of the CUDA kernels, and the time that it would need."""
    kernels = {(k["name"], k["arch"]): k for k in record["kernels"]}
    names = [
        name if name == "scale" else f"{name}-{dtype}"
        for dtype, own in LAUNCHED
        for name in (*own, *LAUNCHED_FOR_BOXES)
    ]
    rows = []
    for name in names:
        if (name, 90) not in kernels:
            continue
        kernel, loop = kernels[name, 90], kernels[name, 90]["loop"]
        widths = {key: ", ".join(f"{n} x {w}" for w, n in loop[key].items()) for key in WIDTHS}
        ratios = [
            f"{kernels[name, gpu['arch']]['predicted'][label]['times_memory']:.2f}"
            for label, gpu in record["gpus"].items()
        ]
        faults = kernel["stack_bytes"] + kernel["calls"] + kernel["divisions_64_bit"]
        each = f"{loop['instructions_an_example']:.1f}"
        code = [name, each, str(kernel["registers"]), str(faults), *widths.values()]
        rows.append(code + ratios)
    head = ("kernel", "instructions", "registers", "stack + calls + divisions", *WIDTHS)
    return (
        f"## Machine code of the CUDA kernels\n\nFrom `{file.relative_to(ROOT)}`, compiled by "
        f"Triton {record['triton']} without a GPU, read by nvdisasm {record['nvdisasm']}. sm_90: "
        f"instructions an example in the main loop (of `gradient-class` in half precision, which "
        f"has code for tiles with labels and without, both together), loads and stores of a "
        f"thread in it by bits. The last columns are the predicted time over what the memory "
        f"alone needs: 1.00 waits for the memory.\n\n"
        f"{markdown_table((*head, *record['gpus']), rows)}\n"
    )


def duration(seconds: float) -> str:
    """Three digits, in the unit that fits."""
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


# --- studies ------------------------------------------------------------------------------------


def reports(folder: Path) -> list[Path]:
    """The reports of `ghm-d2 ablate` in `folder`."""
    found = (file for file in sorted(folder.glob("*/*.md")) if file.with_suffix(".json").exists())
    return [file for file in found if "\n## Compared with " in file.read_text(encoding="utf-8")]


def study(report: Path) -> str:
    """A report as its page in docs/studies shows it: comparison, picture, and a fold with the rest.

    Args:
        report: a Markdown file that `ghm-d2 ablate` has written.
    """
    title, note, *blocks = report.read_text(encoding="utf-8").strip().split("\n\n")
    start = next(i for i, block in enumerate(blocks) if block.startswith("## Compared with "))
    # Heading, table, and the sentence on the intervals.
    compared, others = blocks[start : start + 3], blocks[:start] + blocks[start + 3 :]
    picture = report.with_suffix(".png")
    parts = [*compared, f"From `{report.relative_to(ROOT)}`. {note}"]
    if picture.exists():
        parts.append(f"![{title.lstrip('# ')}](../{relative(picture)})")
    summary = "Every row: figures with their spread, time, memory, and how they were measured"
    others = [re.sub(r"^##", "###", block) for block in others]
    parts += ["<details>", f"<summary>{summary}</summary>", *others, "</details>"]
    return "\n\n".join(parts) + "\n"


def list_of_studies(folder: Path) -> str:
    """What every report came to, a row each, the names of its rows sorted by their verdicts."""
    rows = []
    for report in reports(folder):
        text = report.read_text(encoding="utf-8")
        compared = text.partition("\n## Compared with ")[2].split("\n\n", 2)
        verdicts: dict[str, list[str]] = {}
        for line in compared[1].splitlines()[2:]:
            name, _, _, verdict, *_ = (cell.strip() for cell in line.strip("|").split("|"))
            verdicts.setdefault(verdict, []).append(name)
        page = ROOT / "docs" / "studies" / f"{report.parent.name}.md"
        title = f"[]({page.name})" if page.exists() else page.stem  # the title of the page
        cells = ("; ".join(verdicts.get(key, [])) for key in ("better", "worse", "undecided"))
        rows.append((title, compared[0], *cells))
    return markdown_table(("report", "compared with", "better", "worse", "undecided"), rows) + "\n"


# --- audit --------------------------------------------------------------------------------------


def audit(folder: Path) -> str:
    """Precision of `ghm-d2 audit` and of cleanlab, from every `audit_*.json` in `folder`."""
    text = ""
    for file in sorted(folder.glob("audit_*.json")):
        record = read_json(file)
        text += f"### {record['dataset'].replace('_', ' ')}\n\n{source(file, record)}"
        text += f"{record['note']} {record['images']} images, {record['objects']} objects.\n\n"
        rows = [
            (kind, str(record["errors"][kind]), row["scorer"], f"{row['precision']:.3f}")
            for kind, found in record["rows"].items()
            for row in found
        ]
        text += markdown_table(("kind", "errors", "scorer", "precision"), rows) + "\n\n"
        rows = [
            (kind, *(f"{found[0][f'default_{name}']:.3f}" for name in ("precision", "recall")))
            for kind, found in record["rows"].items()
        ]
        text += "What is chosen without `--number`:\n\n"
        text += markdown_table(("kind", "precision", "recall"), rows) + "\n\n"
    return text


def relative(file: Path) -> str:
    """A file of the repository as the pages in docs/ name it."""
    return f"../{file.relative_to(ROOT).as_posix()}"
