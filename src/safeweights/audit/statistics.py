"""The intervals an audit reports; the formulas live in ``metrics/intervals.py``, where metrics can use them too."""

from safeweights.metrics.intervals import bootstrap_mean, difference, wilson

__all__ = ["bootstrap_mean", "difference", "wilson"]
