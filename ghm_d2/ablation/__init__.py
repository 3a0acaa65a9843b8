"""Ablation tables: plan, run in processes of their own, keep, compare, report."""

from ghm_d2.ablation.grid import TABLES, Grid, Row, load_grid
from ghm_d2.ablation.plan import Run, plan_runs
from ghm_d2.ablation.report import write_report

__all__ = ["TABLES", "Grid", "Row", "Run", "load_grid", "plan_runs", "write_report"]
