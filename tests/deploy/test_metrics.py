"""What Prometheus reads, and where it can."""

import socket
import threading
import urllib.request
from types import SimpleNamespace

import pytest

from fedlora.deploy import metrics
from fedlora.errors import UserError
from fedlora.reports.console import Silent

NODE = SimpleNamespace(served=3, failed=1, epsilon=2.5)


@pytest.fixture
def listening(monkeypatch):
    """The server of each endpoint that was started."""
    started, start = [], metrics.start_http_server

    def recorded(*arguments, **options):
        server, thread = start(*arguments, **options)
        started.append(server)
        return server, thread

    monkeypatch.setattr(metrics, "start_http_server", recorded)
    yield started
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("address", [(), ("127.0.0.2",)])
def test_a_site_s_figures_are_bound_to_loopback_unless_asked(listening, address):
    metrics.of_site(NODE, 0, *address)
    host, port = listening[0].server_address[:2]
    assert host == (address[0] if address else "127.0.0.1")
    told = urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10).read().decode()
    assert "fedlora_site_rounds 3.0" in told and "fedlora_site_epsilon 2.5" in told


def test_a_server_s_figures_are_bound_to_loopback_unless_asked(listening):
    metrics.Exported(Silent(), 0)
    metrics.Exported(Silent(), 0, "127.0.0.2")
    assert [server.server_address[0] for server in listening] == ["127.0.0.1", "127.0.0.2"]


def test_runs_of_a_server_at_once_have_a_port_each(listening, monkeypatch):
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        there.listen()
        port = there.getsockname()[1]
        metrics.Exported(Silent(), port)
        assert port < listening[0].server_address[1] < port + metrics.RUNS
        monkeypatch.setattr(metrics, "RUNS", 1)
        with pytest.raises(UserError, match=r"metrics: no port from \d+ to \d+ of 127.0.0.1 can be used"):
            metrics.Exported(Silent(), port)


def test_a_worker_lets_its_port_go_to_the_next_which_waits_for_it(listening):
    close = metrics.of_site(NODE, 0)
    port = listening[0].server_address[1]
    timer = threading.Timer(0.3, close)
    timer.start()
    metrics.of_site(NODE, port, wait=30.0)
    timer.join()
    assert listening.pop(0).socket.fileno() == -1 and listening[0].server_address[1] == port


def test_a_port_that_is_taken_is_a_line(listening):
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        there.listen()
        with pytest.raises(UserError, match=r"metrics: port \d+ of 127.0.0.1 cannot be used: .*; name another"):
            metrics.of_site(NODE, there.getsockname()[1])
