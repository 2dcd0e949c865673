"""A local S3 server for tests: moto in a process of its own, with an empty bucket."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

BUCKET = "bucket"


@contextlib.contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Context manager: starts the server, sets fsspec's options for it, and gives its address.

    The test is skipped if moto or s3fs is absent.
    """
    pytest.importorskip("moto.server", reason="the package moto[server] is absent")
    s3fs = pytest.importorskip("s3fs", reason="the package s3fs is absent")
    from fsspec import config

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "FSSPEC_S3_ENDPOINT_URL": url,
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config.set_conf_env(config.conf)  # as a new process reads the environment
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ,
    )
    try:
        fs = s3fs.S3FileSystem()
        for _ in range(120):
            with contextlib.suppress(Exception):
                fs.mkdir(BUCKET)
                break
            time.sleep(0.5)
        yield url
    finally:
        config.conf.pop("s3", None)
        s3fs.S3FileSystem.clear_instance_cache()
        server.terminate()
        server.wait()
