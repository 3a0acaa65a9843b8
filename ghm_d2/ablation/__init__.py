"""Ablation tables: plan, tune, run in processes of their own, keep, compare, report."""

from .grid import TABLES, Grid, Row, load_grid
from .plan import Run, plan_runs
from .report import write_report
from .tuning import tune

__all__ = ["TABLES", "Grid", "Row", "Run", "load_grid", "plan_runs", "tune", "write_report"]
