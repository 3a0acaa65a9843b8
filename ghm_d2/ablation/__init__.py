"""Ablation tables: plan, run in processes of their own, keep, compare, report."""

from ghm_d2.ablation.command import main
from ghm_d2.ablation.grid import TABLES, Grid, Row, load_grid

__all__ = ["TABLES", "Grid", "Row", "load_grid", "main"]
