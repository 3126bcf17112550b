"""What Prometheus reads of a server and of a site."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from fedlora.errors import UserError
from fedlora.reports.console import Display
from fedlora.scenario import Scenario

if TYPE_CHECKING:
    from fedlora.deploy.node import Node


LOOPBACK = "127.0.0.1"


class Exported:
    """A display that also counts for Prometheus: rounds, bytes, failures, seconds, epsilon and the metric."""

    def __init__(self, inner: Display, port: int, address: str = LOOPBACK) -> None:
        """Around a display.

        Args:
            inner: that is shown the same.
            port: of the endpoint.
            address: that it listens on.
        """
        self.inner, self._metric = inner, "accuracy"
        registry = CollectorRegistry()
        self._rounds = Counter("fedlora_rounds", "Rounds finished", registry=registry)
        self._bytes = Counter("fedlora_bytes", "Bytes on the wire", ["direction"], registry=registry)
        self._failures = Counter("fedlora_client_failures", "Clients that failed in a round", registry=registry)
        self._seconds = Gauge("fedlora_round_seconds", "Seconds of the last round", registry=registry)
        self._epsilon = Gauge("fedlora_epsilon", "The largest epsilon over clients", registry=registry)
        self._quality = Gauge("fedlora_metric", "The last accuracy or perplexity", ["name"], registry=registry)
        _listen(port, address, registry)

    def stage(self, what: str) -> None:
        """Nothing to count."""
        self.inner.stage(what)

    def note(self, what: str) -> None:
        """Nothing to count."""
        self.inner.note(what)

    def begin(self, scenario: Scenario, metric: str, done: int) -> None:
        """Nothing to count yet."""
        self._metric = metric
        self.inner.begin(scenario, metric, done)

    def round(self, line: Mapping[str, Any]) -> None:
        """Count a round."""
        self._rounds.inc()
        self._failures.inc(line["failures"])
        self._seconds.set(line["seconds"])
        for direction in ("up", "down"):
            self._bytes.labels(direction).inc(line[f"bytes_{direction}"])
        if line["epsilon"] is not None:
            self._epsilon.set(line["epsilon"])
        if line.get(self._metric) is not None:
            self._quality.labels(self._metric).set(line[self._metric])
        self.inner.round(line)


def of_site(node: "Node", port: int, address: str = LOOPBACK) -> None:
    """Export what a node served, what failed, and what its examples have lost in all runs together."""
    registry = CollectorRegistry()
    for name, what, value in (
        ("fedlora_site_rounds", "Rounds trained", lambda: float(node.served)),
        ("fedlora_site_failures", "Rounds refused or failed", lambda: float(node.failed)),
        ("fedlora_site_epsilon", "Epsilon of the site's examples over all runs", lambda: node.epsilon or 0.0),
    ):
        Gauge(name, what, registry=registry).set_function(value)
    _listen(port, address, registry)


def _listen(port: int, address: str, registry: CollectorRegistry) -> None:
    try:
        start_http_server(port, addr=address, registry=registry)
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(f"metrics: port {port} of {address} cannot be used: {why}; name another") from error
