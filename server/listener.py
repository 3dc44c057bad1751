"""A gRPC port of ours: mutual TLS with certificates of the network's own authority."""

from functools import lru_cache
from pathlib import Path

import grpc

from common.certificates import common_name, parse_certificate
from common.config import ServerConfig
from common.errors import LaunchError
from server.identity import ServerFiles
from server.members import authority_of, hosts_of
from server.registry import Registry

OPTIONS = (
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # devices on bad links ask every 30 s whether the line is still there
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),
)


def files_for(settings: ServerConfig, folder: Path) -> ServerFiles:
    """The server's certificate, renewed where that is due; makes registry and authority at first.

    Raises:
        StateError: what is in the folder is damaged.
    """
    Registry.create(folder, settings.server.name).close()
    authority = authority_of(settings, folder)
    authority.renew_server(hosts_of(settings))
    return authority.server_credentials()


def listen(server: grpc.aio.Server, host: str, port: int, files: ServerFiles, section: str) -> None:
    """Open the port of a section of server.toml to callers with a certificate of the network.

    Raises:
        LaunchError: the port is taken.
    """
    credentials = grpc.ssl_server_credentials(
        [(files.key, files.certificate)], root_certificates=files.ca, require_client_auth=True
    )
    try:
        server.add_secure_port(f"{host}:{port}", credentials)
    except RuntimeError as error:
        raise LaunchError(
            f"the {section} cannot listen on {host}:{port}: stop what does, or choose "
            f"another port in [{section}]"
        ) from error


def caller(context: grpc.aio.ServicerContext) -> tuple[str, int]:
    """Whose certificate was shown, and its number; TLS has checked the rest."""
    return _shown(context.auth_context()["x509_pem_cert"][0])


@lru_cache(maxsize=4096)
def _shown(certificate: bytes) -> tuple[str, int]:
    parsed = parse_certificate(certificate, "the certificate")
    return common_name(parsed.subject), parsed.serial_number
