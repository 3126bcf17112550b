"""What Prometheus reads of a server and of a site."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from fedlora.errors import UserError
from fedlora.reports.console import Display
from fedlora.scenario import Scenario

if TYPE_CHECKING:
    from fedlora.deploy.node import Node

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
RUNS = 10  # ports that are tried for the runs of a server, one after another
_PAUSE = 0.2  # seconds between two tries


class Exported:
    """A display that also counts for Prometheus: rounds, bytes, failures, seconds, epsilon and the metric."""

    def __init__(self, inner: Display, port: int, address: str = LOOPBACK) -> None:
        """Around a display.

        Args:
            inner: that is shown the same.
            port: of the endpoint, or the first of `RUNS` where other runs have theirs.
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
        for number in range(port, port + (RUNS if port else 1)):
            try:
                _listen(number, address, registry)
            except UserError as error:
                logger.warning("%s", error)
                continue
            if number != port:
                logger.info("the figures of this run are at port %d of %s", number, address)
            return
        raise UserError(
            f"metrics: no port from {port} to {port + RUNS - 1} of {address} can be used; name another"
        )

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


def of_site(node: "Node", port: int, address: str = LOOPBACK, wait: float = 0.0) -> Callable[[], None]:
    """Export what a node served, what failed, and what its examples have lost in all runs together.

    Args:
        node: of the site.
        port: of the endpoint.
        address: that it listens on.
        wait: seconds in which a worker before this one may let the port go.

    Returns:
        Lets the port go.

    Raises:
        UserError: the port cannot be used.
    """
    registry = CollectorRegistry()
    for name, what, value in (
        ("fedlora_site_rounds", "Rounds trained", lambda: float(node.served)),
        ("fedlora_site_failures", "Rounds refused or failed", lambda: float(node.failed)),
        ("fedlora_site_epsilon", "Epsilon of the site's examples over all runs", lambda: node.epsilon or 0.0),
    ):
        Gauge(name, what, registry=registry).set_function(value)
    end = time.monotonic() + wait
    while True:
        try:
            return _listen(port, address, registry)
        except UserError:
            if time.monotonic() >= end:
                raise
            time.sleep(_PAUSE)


def _listen(port: int, address: str, registry: CollectorRegistry) -> Callable[[], None]:
    try:
        server, _ = start_http_server(port, addr=address, registry=registry)
    except OSError as error:
        why = error.strerror or str(error)
        raise UserError(f"metrics: port {port} of {address} cannot be used: {why}; name another") from error

    def close() -> None:
        server.shutdown()
        server.server_close()

    return close
