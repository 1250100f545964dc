"""Market ticks to leak-free features, walk-forward models and honest reports, as one Dagster asset graph."""
