"""A farm joins the network: its request for a certificate becomes its membership."""

from pathlib import Path

from common.certificates import common_name, parse_certificate
from common.config import HubConfig, ServerConfig
from common.errors import ConfigError
from common.membership import Membership
from server.identity import Authority
from server.registry import Registry

EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104


def certified(
    config: ServerConfig, state_dir: Path, request: Path, hub: str | None = None
) -> Membership:
    """Sign a farm's request.

    Args:
        config: of the server.
        state_dir: of the server.
        request: what the farm wrote.
        hub: address by which the farm reaches the hub; by default the first name it has.

    Raises:
        ConfigError: the request cannot be read, or the hub is listening but has no name.
        ProtocolError: the request is not one that may be signed.
        StateError: the authority or the keys are damaged.
    """
    try:
        asked = request.read_bytes()
    except OSError as error:
        raise ConfigError(f"no request at '{request}': {error.strerror or error}") from error
    name, identity = config.server.name, state_dir / "identity"
    if not identity.exists():
        Authority.create(identity, name, [])
    authority = Authority.open(identity)
    with Registry.create(state_dir, name) as registry:
        keys = registry.keys.text
    certificate = authority.sign(asked)
    return Membership(
        network=authority.network,
        farm=farm_of(certificate),
        hub=hub or (None if config.hub is None else _address(config.hub)),
        certificate=certificate.decode(),
        authority=authority.server_credentials().ca.decode(),
        keys=keys,
    )


def _address(config: HubConfig) -> str:
    host = config.names[0] if config.names else config.host
    if host in EVERYWHERE:
        raise ConfigError(
            "[hub] listens everywhere but has no name; set its names, or give --hub host:port"
        )
    return f"{host}:{config.port}"


def farm_of(certificate: bytes) -> str:
    """The name in a certificate."""
    return common_name(parse_certificate(certificate, "the certificate").subject)
