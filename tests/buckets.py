"""An S3 server on the loopback interface (moto), for tests and benchmarks."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-key",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextlib.contextmanager
def s3_server(*buckets: str) -> Iterator[tuple[str, int]]:
    """The address of a server with these buckets; the environment names it and its credentials as long as the block runs."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = server.get_host_and_port()
    try:
        with environment(**ENVIRONMENT, AWS_ENDPOINT_URL=f"http://{address[0]}:{address[1]}"):
            client = boto3.client("s3")
            for bucket in buckets:
                client.create_bucket(Bucket=bucket)
            client.close()
            yield address
    finally:
        server.stop()


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """These variables as long as the block runs. Connections that were made before are forgotten: drivers keep them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    forget_connections()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        forget_connections()


def forget_connections() -> None:
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
