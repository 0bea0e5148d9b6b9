"""Turn the artifacts of a finished run into a page, and its figures into SVG. No model is needed."""

from __future__ import annotations

from refusalkit.report.charts import chart_names, chart_svg
from refusalkit.report.page import render_html

__all__ = ["chart_names", "chart_svg", "render_html"]
