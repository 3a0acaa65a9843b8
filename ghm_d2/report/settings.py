"""A config against the defaults of Detectron2 and this package."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from detectron2.config import get_cfg

from ghm_d2.config import add_ghm_config
from ghm_d2.errors import shown

__all__ = ["differences"]


def differences(settings: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Every key whose value is not the default.

    Args:
        settings: a config as nested dictionaries.

    Returns:
        (key, value, default) as text, in the order of the config; the default is empty where this
        version has no such key.
    """
    cfg = get_cfg()
    add_ghm_config(cfg)
    defaults = dict(_leaves(yaml.safe_load(cfg.dump())))
    return [
        (key, _shown(value), _shown(defaults[key]) if key in defaults else "")
        for key, value in _leaves(settings)
        if key not in defaults or defaults[key] != value
    ]


def _shown(value: Any) -> str:
    return '""' if value == "" else shown(value)


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
