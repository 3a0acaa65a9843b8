"""A grid: the rows of an ablation table, read from YAML. The paper's tables are such files too."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ghm_d2.config_files import find_config, similar_configs
from ghm_d2.data.corrupt import check_shares
from ghm_d2.errors import UserError, cannot, reason, similar_names

# The paper's tables that come with the package: name -> file.
TABLES = {path.stem: path for path in sorted((Path(__file__).parent / "tables").glob("*.yaml"))}

SPEED = "seconds_per_iteration"
_SCALARS = (str, int, float, bool, list, type(None))


@dataclass(frozen=True)
class Row:
    """One row of the table: what differs from the other rows.

    Attributes:
        name: unique in its grid.
        overrides: config key to value.
        config_file: a base config of this row's own; None: that of the grid.
        published: column (or "seconds_per_iteration") to the value that the paper gives.
        note: shown below the table.
        corrupt: kind of error to its share of the training data's objects; see
            :func:`ghm_d2.data.corrupt.corrupt_coco`.
    """

    name: str
    overrides: Mapping[str, Any]
    config_file: Path | None = None
    published: Mapping[str, float] | None = None
    note: str = ""
    corrupt: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuning:
    """How every row of a grid is tuned before it is reported.

    Attributes:
        keys: config key to the factor, above 1, of one step up or down.
        tries: configs that each row may try, its own among them, at least 2.
        seeds: values of SEED; none of them is reported.
        fraction: of the training images, held out to choose on.
        split_seed: another one holds other images out.
    """

    keys: Mapping[str, float]
    tries: int
    seeds: tuple[int, ...] = (101,)
    fraction: float = 0.25
    split_seed: int = 1


@dataclass(frozen=True)
class Grid:
    """An ablation table before it is run.

    Attributes:
        name: stem of its file, and of the report's files.
        title: heading of the report.
        config_file: base config of the rows.
        rows: in the order of the table.
        overrides: config key to value, for all rows.
        columns: names of the evaluation's figures; the first is the one that rows are compared by.
        reference: name of the row that the others are compared with; "": no comparison.
        compare: name of a row to that of the row it is compared with, which has the same data; in
            a file, the names of the rows compared with `reference`, all others by default.
        published_on: what the published values were measured on.
        note: shown below the heading.
        tuning: how the rows are tuned first; None: they are taken as they are.
    """

    name: str
    title: str
    config_file: Path
    rows: tuple[Row, ...]
    overrides: Mapping[str, Any]
    columns: tuple[str, ...] = ("AP", "AP50", "AP75")
    reference: str = ""
    compare: Mapping[str, str] = field(default_factory=dict)
    published_on: str = ""
    note: str = ""
    tuning: Tuning | None = None


_ROW_FIELDS = tuple(x.name for x in fields(Row) if x.name != "corrupt")
_GRID_FIELDS = (*(x.name for x in fields(Grid) if x.name != "name"), "corrupt")


def load_grid(file: str | Path) -> Grid:
    """Read and check a grid.

    Args:
        file: YAML with the fields of :class:`Grid` (without `name`), its `rows` with those of
            :class:`Row` (without `corrupt`); every `config_file` is relative to this file, or a
            name in `configs/`. With a field `corrupt`, a name to the shares of a :class:`Row`, all
            rows are there once for each of these names.

    Raises:
        UserError: the file cannot be read, or what it holds is not a grid.
    """
    file = Path(file)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise cannot("read", f"the grid {file}", error) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the grid {file} is not valid YAML: {reason(error)}.") from error
    _check_fields(str(file), content, _GRID_FIELDS, required=("config_file", "rows"))
    if not isinstance(content["rows"], list) or not content["rows"]:
        raise UserError(f"{file}: rows must be a list that is not empty.")
    rows = tuple(_row(file, number, row) for number, row in enumerate(content["rows"], start=1))
    names = [row.name for row in rows]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{file}: more than one row is called {double!r}.")
    columns = _names(file, "columns", content.get("columns", Grid.columns))
    if not columns:
        raise UserError(f"{file}: columns must name at least one figure, for example AP.")
    reference, compare = content.get("reference", ""), content.get("compare", [])
    compare = _names(file, "compare", compare)
    for name in (*compare, *filter(None, [reference])):
        if name not in names:
            raise UserError(f"{file}: there is no row {name!r}{similar_names(name, names)}.")
    if compare and not reference:
        raise UserError(f"{file}: compare needs a reference row.")
    for row in rows:
        for key in row.published or {}:
            if key not in (*columns, SPEED):
                raise UserError(
                    f"{file}: row {row.name!r} publishes {key!r}, which is neither among the "
                    f"columns ({', '.join(columns)}) nor {SPEED}."
                )
    compare = compare or tuple(n for n in names if reference and n != reference)
    noise = _noise(f"{file}: corrupt", content.get("corrupt"))
    ends = {f", {name}" if name else "": shares for name, shares in noise.items()}
    return Grid(
        name=file.stem,
        title=str(content.get("title", file.stem)),
        config_file=_config_file(file, content["config_file"]),
        rows=tuple(
            replace(row, name=row.name + end, corrupt=shares)
            for end, shares in ends.items()
            for row in rows
        ),
        overrides=_overrides(str(file), content.get("overrides")),
        columns=columns,
        reference=reference,
        compare={name + end: reference + end for end in ends for name in compare},
        published_on=str(content.get("published_on", "")),
        note=str(content.get("note", "")).strip(),
        tuning=_tuning(f"{file}: tuning", content.get("tuning")),
    )


def _noise(where: str, content: Any) -> dict[str, dict[str, float]]:
    """Name to shares; one without name or errors where the grid does not say."""
    if content is None:
        return {"": {}}
    if not isinstance(content, dict) or not content:
        raise UserError(f"{where} must map names to shares of errors, got {content!r}.")
    for name, shares in content.items():
        if not isinstance(shares, dict) or any(
            type(x) not in (int, float) for x in shares.values()
        ):
            raise UserError(f"{where}: {name} must map kinds of errors to shares, got {shares!r}.")
        try:
            check_shares(shares)
        except UserError as error:
            raise UserError(f"{where}: {name}: {error}") from error
    return {str(name): shares for name, shares in content.items()}


def _tuning(where: str, content: Any) -> Tuning | None:
    if content is None:
        return None
    _check_fields(where, content, [x.name for x in fields(Tuning)], ("keys", "tries"))
    keys = content["keys"]
    if not isinstance(keys, dict) or not keys:
        raise UserError(f"{where}: keys must map config keys to factors, got {keys!r}.")
    numbers = {"tries": 2, "split_seed": 0}
    found = Tuning(**content | {"seeds": tuple(content.get("seeds", Tuning.seeds))})
    for key, factor in keys.items():
        if not isinstance(factor, int | float) or not factor > 1:
            raise UserError(f"{where}: the factor of {key} must be above 1, got {factor!r}.")
    for name, least in numbers.items():
        value = getattr(found, name)
        if type(value) is not int or value < least:
            raise UserError(f"{where}: {name} must be a whole number >= {least}, got {value!r}.")
    if not isinstance(found.fraction, int | float) or not 0 < found.fraction < 1:
        raise UserError(f"{where}: fraction must lie between 0 and 1, got {found.fraction!r}.")
    if not found.seeds or any(type(seed) is not int or seed < 0 for seed in found.seeds):
        raise UserError(f"{where}: seeds must be whole numbers of at least 0.")
    return found


def _row(file: Path, number: int, content: Any) -> Row:
    where = f"{file}: row {number}"
    _check_fields(where, content, _ROW_FIELDS, required=("name",))
    published = content.get("published") or {}
    numbers = isinstance(published, dict) and all(
        isinstance(v, int | float) for v in published.values()
    )
    if not numbers:
        raise UserError(f"{where}: published must map columns to numbers, got {published!r}.")
    own = content.get("config_file")
    return Row(
        name=str(content["name"]),
        overrides=_overrides(where, content.get("overrides")),
        config_file=None if own is None else _config_file(file, own),
        published=published,
        note=str(content.get("note", "")).strip(),
    )


def _check_fields(where: str, content: Any, known: Sequence[str], required: Sequence[str]) -> None:
    if not isinstance(content, dict):
        raise UserError(f"{where} holds a {type(content).__name__} where {known} are expected.")
    for name in content:
        if name not in known:
            raise UserError(
                f"{where}: unknown field {name!r}{similar_names(str(name), known)}; "
                f"there are {', '.join(known)}."
            )
    for name in required:
        if content.get(name) is None:
            raise UserError(f"{where} has no {name}.")


def _overrides(where: str, content: Any) -> dict[str, Any]:
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise UserError(f"{where}: overrides must map config keys to values, got {content!r}.")
    for key, value in content.items():
        if not isinstance(value, _SCALARS):
            raise UserError(
                f"{where}: the override {key} must be a number, a text, True, False, null or a "
                f"list, got {value!r} (write the whole key, A.B.C, on one line)."
            )
    return content


def _names(file: Path, field: str, content: Any) -> tuple[str, ...]:
    if not isinstance(content, list | tuple) or not all(isinstance(x, str) for x in content):
        raise UserError(f"{file}: {field} must be a list of names, got {content!r}.")
    return tuple(content)


def _config_file(grid: Path, name: str) -> Path:
    path = (grid.parent / name).resolve()
    if path.is_file():
        return path
    if found := find_config(name):
        return Path(found).resolve()
    raise UserError(
        f"{grid}: the config file {name} does not exist, neither beside it ({path}) nor in "
        f"configs/{similar_configs(name)}."
    )
