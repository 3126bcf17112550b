"""Metrics of rows that have one label each."""

from fedlora.metrics.contract import Metric

METRICS: tuple[Metric, ...] = ()
