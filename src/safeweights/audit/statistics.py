"""The intervals an audit reports; the formulas live in ``core/intervals.py``, where metrics can use them too."""

from safeweights.core.intervals import bootstrap_mean, difference, wilson

__all__ = ["bootstrap_mean", "difference", "wilson"]
