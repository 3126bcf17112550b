"""`docker/health.py`: it tells a service that serves from all else, and costs little."""

import datetime
import http.server
import socket
import ssl
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

FILE = Path(__file__).parents[2] / "docker" / "health.py"
STATUS = health_pb2.HealthCheckResponse


def asked(*words):
    """The exit code of a check, and what it says."""
    done = subprocess.run([sys.executable, str(FILE), *words], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr


@pytest.fixture
def service():
    """A gRPC server with the health service; gives its address and what sets its status."""
    server, told = grpc.server(ThreadPoolExecutor(1)), health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(told, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}", lambda status: told.set("", status)
    server.stop(None).wait()


def test_a_grpc_service_that_serves_is_told_from_one_that_does_not(service):
    address, says = service
    assert asked(address) == (0, "")
    says(STATUS.NOT_SERVING)
    assert asked(address) == (1, f"{address}: OSError: says that it does not serve\n")


def test_a_service_without_the_health_protocol_is_none():
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    code, said = asked(f"127.0.0.1:{port}")
    server.stop(None).wait()
    assert code == 1 and "gives no answer" in said


def test_an_open_port_is_not_enough():
    with closing(socket.create_server(("127.0.0.1", 0))) as listens:
        threading.Thread(target=lambda: listens.accept()[0].close(), daemon=True).start()
        code, said = asked(f"127.0.0.1:{listens.getsockname()[1]}")
    assert code == 1 and "Error" in said and said.count("\n") == 1


@pytest.fixture
def page(tmp_path):
    """An HTTPS server whose certificate is its own CA; gives its port."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    made = made.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    plain = serialization.Encoding.PEM
    (tmp_path / "ca.crt").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(plain))
    (tmp_path / "key").write_bytes(
        key.private_bytes(plain, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 503)
            self.end_headers()

        def log_message(self, *_):
            pass

    class Quiet(http.server.ThreadingHTTPServer):
        def handle_error(self, *_):
            pass

    server = Quiet(("127.0.0.1", 0), Answers)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ca.crt", tmp_path / "key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_a_page_is_asked_by_https_with_its_certificate_held_to_the_ca(page, tmp_path):
    assert asked(f"https://localhost:{page}/health", str(tmp_path / "ca.crt")) == (0, "")
    code, said = asked(f"https://localhost:{page}/other", str(tmp_path / "ca.crt"))
    assert code == 1 and "503" in said
    code, said = asked(f"https://127.0.0.1:{page}/health", str(tmp_path / "ca.crt"))
    assert code == 1 and "CERTIFICATE_VERIFY_FAILED" in said


def test_a_check_imports_neither_grpc_nor_a_client_of_http(service):
    told = subprocess.run(
        [sys.executable, "-X", "importtime", str(FILE), service[0]], capture_output=True, text=True, check=True
    )
    assert {"grpc", "urllib.request", "http.client", "ssl", "google.protobuf"}.isdisjoint(told.stderr.split())
