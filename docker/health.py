"""Whether a service answers as one that serves: `python health.py ADDRESS`, or `python health.py URL CA`.

An address is asked by the gRPC health protocol, a URL by HTTPS with its certificate held to a CA.
Exit code 0 or 1. It runs for as long as the service does, so it imports little: of gRPC it writes the few frames
of HTTP/2 itself (RFC 9113), with headers that are not compressed (RFC 7541, 6.2.2).
"""

import socket
import sys

SECONDS = 5
DATA, HEADERS, SETTINGS = 0, 1, 4  # kinds of frames
END, END_HEADERS, ACK = 1, 4, 1  # their flags
SERVING = b"\x00\x00\x00\x00\x02\x08\x01"  # a message of two bytes: field 1 (status) is 1


def frame(kind: int, flags: int, stream: int, data: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    return len(data).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + data


def header(name: bytes, value: bytes) -> bytes:
    """A header, each part with its length before it."""
    return b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value


def grpc(address: str) -> None:
    """Raise where the service does not say that it serves."""
    host, _, port = address.rpartition(":")
    asked = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": b"/grpc.health.v1.Health/Check",
        b":authority": address.encode(),
        b"te": b"trailers",
        b"content-type": b"application/grpc",
    }
    with socket.create_connection((host, int(port)), timeout=SECONDS) as connection:
        connection.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + frame(SETTINGS, 0, 0)
            + frame(HEADERS, END_HEADERS, 1, b"".join(header(name, value) for name, value in asked.items()))
            + frame(DATA, END, 1, bytes(5))  # a message of no bytes: about the whole server
        )
        with connection.makefile("rb") as answer:
            while len(head := answer.read(9)) == 9:
                data = answer.read(int.from_bytes(head[:3], "big"))
                kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
                if kind == SETTINGS and not flags & ACK:
                    connection.sendall(frame(SETTINGS, ACK, 0))
                if (kind, stream) == (DATA, 1) and data:
                    if data != SERVING:
                        raise OSError("says that it does not serve")
                    return
                if stream == 1 and flags & END:
                    break
    raise OSError("gives no answer")


def https(url: str, ca: str) -> None:
    """Raise where the answer is none, or an error, or of another than the CA signed."""
    import ssl

    address, _, path = url.removeprefix("https://").partition("/")
    host, _, port = address.partition(":")
    context = ssl.create_default_context(cafile=ca)
    with (
        socket.create_connection((host, int(port or 443)), timeout=SECONDS) as plain,
        context.wrap_socket(plain, server_hostname=host) as connection,
    ):
        connection.sendall(f"GET /{path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
        with connection.makefile("rb") as answer:
            status = answer.readline(200).decode("latin-1").strip()
    if status.split(" ")[1:2] != ["200"]:
        raise OSError(f"says {status or 'nothing'}")


if __name__ == "__main__":
    try:
        https(*sys.argv[1:3]) if sys.argv[1].startswith("https://") else grpc(sys.argv[1])
    except Exception as error:  # whatever it is, a person reads it in `docker inspect`
        sys.exit(f"{sys.argv[1]}: {type(error).__name__}: {error}")
