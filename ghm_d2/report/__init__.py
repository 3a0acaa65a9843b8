"""One HTML page about a training: settings, curves, gradients, AP, best and worst images."""

from .page import write_report

__all__ = ["write_report"]
