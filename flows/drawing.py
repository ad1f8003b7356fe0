"""The parts of matplotlib that are used here, imported in this one place.

Two threads of a run draw: MLflow's sender its plots, the main one the page of a comparison. Where both import parts of
a package for the first time, and those import each other, Python gives one of them half a module rather than lock up.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

__all__ = ["Axes", "Figure", "MaxNLocator"]
