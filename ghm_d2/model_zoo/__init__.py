"""Configs and trained models by name, with Detectron2's model zoo functions.

Trained weights come from the zoo that the environment variable `GHM_D2_ZOO` names: a folder that
`ghm-d2 export-zoo` has filled, or the http(s) address of one. Once this package is imported,
Detectron2's `PathManager` checks every download from that address.
"""

from .model_zoo import get, get_checkpoint_url, get_config, get_config_file
from .zoo import ZooError, register_zoo

__all__ = ["ZooError", "get", "get_checkpoint_url", "get_config", "get_config_file"]

register_zoo()
