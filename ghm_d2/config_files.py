"""The config files of this project, by name."""

from pathlib import Path

from ghm_d2.errors import similar_names


def configs_folder() -> Path:
    """The folder `configs`: inside the installed package, or at the root of the checkout."""
    installed = Path(__file__).with_name("configs")
    return installed if installed.is_dir() else Path(__file__).parents[1] / "configs"


def find_config(name: str) -> str | None:
    """The path of a config, named with or without `configs/` in front; None if there is none."""
    file = configs_folder() / name.removeprefix("configs/")
    return str(file) if file.is_file() else None


def config_names() -> list[str]:
    """The names of all YAML configs, from inside `configs/`."""
    root = configs_folder()
    return [path.relative_to(root).as_posix() for path in root.rglob("*.yaml")]


def similar_configs(name: str) -> str:
    """Similar names of configs, as :func:`similar_names` puts them for a message."""
    return similar_names(name, config_names())
