"""Whether a service answers as one that serves: `python health.py ADDRESS`, or `python health.py URL CA`.

An address is asked by the gRPC health protocol, a URL by HTTPS with its certificate held to a CA.
Exit code 0 or 1.
"""

import sys

SECONDS = 5


def grpc(address: str) -> None:
    """Raise where the service does not say that it serves."""
    import grpc
    from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
    from grpc_health.v1.health_pb2_grpc import HealthStub

    with grpc.insecure_channel(address) as channel:
        told = HealthStub(channel).Check(HealthCheckRequest(), timeout=SECONDS).status
    if told != HealthCheckResponse.SERVING:
        raise OSError(f"says {HealthCheckResponse.ServingStatus.Name(told)}")


def https(url: str, ca: str) -> None:
    """Raise where the answer is none, or an error, or of another than the CA signed."""
    import ssl
    import urllib.request

    with urllib.request.urlopen(url, timeout=SECONDS, context=ssl.create_default_context(cafile=ca)):
        pass


if __name__ == "__main__":
    try:
        https(*sys.argv[1:3]) if sys.argv[1].startswith("https://") else grpc(sys.argv[1])
    except Exception as error:  # whatever it is, a person reads it in `docker inspect`
        sys.exit(f"{sys.argv[1]}: {type(error).__name__}: {error}")
