"""What people look at: `report.html` and plots, made from plain data (report.json) without torch, without the network, without JavaScript."""

from qcore.reporting.page import render
from qcore.reporting.pareto import pareto_plot

__all__ = ["pareto_plot", "render"]
