"""`local_ray`: Ray on this machine for this process, closed to everybody else, and gone afterwards.

Ray is made for clusters that trust their network: whoever reaches one of its ports can run code. Here it stays on
127.0.0.1; the one port that Ray Serve opens on every address (each replica's) speaks only to holders of a certificate
that is made for this process, as do all others; and the HTTP interface of its agent asks for a token of this process.
Usage statistics, which Ray would send home, are off.
"""

import contextlib
import datetime
import ipaddress
import logging
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Generator
from functools import cache
from pathlib import Path

from hanlin.core.errors import HanlinError, require

OBJECT_BYTES = 80 << 20  # of Ray's shared memory: about the least that it takes


@contextlib.contextmanager
def local_ray(*, cpus: int, gpus: int, object_bytes: int = OBJECT_BYTES, quiet: bool = False) -> Generator[Path]:
    """Ray without its dashboard; yields a folder that every process sees. cpus, gpus: places, as Ray counts;
    object_bytes: of shared memory, for what is sent to many processes at once; quiet: what they print is dropped."""
    closed = _credentials.cache_info().currsize > 0
    if "ray" in sys.modules and not closed:  # it would be open: it has read its environment already
        raise HanlinError(
            "Ray is loaded in this process already, and would be open to others. Start from a fresh process, such as "
            "`hanlin serve` or `hanlin train`."
        )
    os.environ.update(_privacy(Path(_credentials().name)))  # read by Ray when it is imported, and by its processes
    ray = require("ray", "ray")
    if ray.is_initialized():
        raise HanlinError("Ray runs in this process already; close what uses it first.")
    folder = Path(tempfile.mkdtemp(prefix="hanlin-ray-"))
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            num_gpus=gpus,
            object_store_memory=max(object_bytes, OBJECT_BYTES),
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=not quiet,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder),
        )
        try:
            yield folder
        finally:
            ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@cache  # Ray keeps the first certificate and token that a process shows it
def _credentials() -> "tempfile.TemporaryDirectory[str]":
    """A folder with this process's key, certificate and token, gone when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="hanlin-ray-", ignore_cleanup_errors=True)
    key, certificate = _certificate()
    contents = {"key.pem": key, "certificate.pem": certificate, "token": secrets.token_hex(32).encode()}
    for name, content in contents.items():
        with os.fdopen(os.open(Path(folder.name) / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
    return folder


def _privacy(folder: Path) -> dict[str, str]:
    """The environment that closes Ray."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux too: only then does Ray stay on 127.0.0.1
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": (folder / "token").read_text(encoding="ascii"),
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_KEY": str(folder / "key.pem"),
        "RAY_TLS_SERVER_CERT": str(folder / "certificate.pem"),
        "RAY_TLS_CA_CERT": str(folder / "certificate.pem"),  # signed by itself: nobody else can make another
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a process without a share of a GPU sees none
    }


def _certificate() -> tuple[bytes, bytes]:
    """A fresh private key and a certificate for 127.0.0.1 that it has signed, both PEM."""
    x509 = require("cryptography.x509", "ray")
    primitives = "cryptography.hazmat.primitives"
    hashes, serialization = require(f"{primitives}.hashes", "ray"), require(f"{primitives}.serialization", "ray")
    ec = require(f"{primitives}.asymmetric.ec", "ray")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "hanlin")])
    now = datetime.datetime.now(datetime.UTC)
    here = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks are set back now and then
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(here), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, certificate.public_bytes(pem)
