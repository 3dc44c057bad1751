"""A farm joins the network: its request for a certificate becomes its membership."""

from pathlib import Path

from common.certificates import common_name, parse_certificate
from common.config import ServerConfig
from common.door import DoorConfig
from common.errors import ConfigError
from common.membership import Membership
from common.services import HubConfig
from server.identity import Authority
from server.registry import Registry

EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104


def certified(
    config: ServerConfig, state_dir: Path, request: Path, hub: str | None = None
) -> Membership:
    """Sign a farm's request that came as a file.

    Args:
        config: of the server.
        state_dir: of the server.
        request: what the farm wrote.
        hub: address by which the farm reaches the hub; by default the first name it has.

    Raises:
        ConfigError: the request cannot be read, or the hub or the door is listening but has no
            name.
        ProtocolError: the request is not one that may be signed.
        StateError: the authority or the keys are damaged.
    """
    try:
        asked = request.read_bytes()
    except OSError as error:
        raise ConfigError(f"no request at '{request}': {error.strerror or error}") from error
    return member_of(config, state_dir, asked, hub)


def member_of(
    config: ServerConfig, state_dir: Path, asked: bytes, hub: str | None = None
) -> Membership:
    """The membership for a request; errors as :func:`certified`."""
    authority = authority_of(config, state_dir)
    door = None if config.door is None else address_of(config.door, "[door]")
    if hub is None and config.hub is not None:
        hub = address_of(config.hub, "[hub]")
    with Registry.create(state_dir, config.server.name) as registry:
        keys = registry.keys.text
    certificate = authority.sign(asked)
    return Membership(
        network=authority.network,
        farm=farm_of(certificate),
        hub=hub,
        door=door,
        certificate=certificate.decode(),
        authority=authority.server_credentials().ca.decode(),
        keys=keys,
    )


def authority_of(config: ServerConfig, state_dir: Path) -> Authority:
    """The network's authority, created if there is none yet; its list for brokers is written."""
    identity = state_dir / "identity"
    if not identity.exists():
        Authority.create(identity, config.server.name, hosts_of(config))
    authority = Authority.open(identity)
    authority.write_revoked()
    return authority


def hosts_of(config: ServerConfig) -> list[str]:
    """What the server's certificate has to name: hub, door and region show the same one."""
    return [
        host
        for listener in (config.hub, config.door, config.region)
        if listener is not None
        for host in (listener.host, *listener.names)
    ]


def address_of(config: HubConfig | DoorConfig, section: str) -> str:
    """``host:port`` by which farms reach a listener.

    Raises:
        ConfigError: it listens everywhere but has no name.
    """
    host = config.names[0] if config.names else config.host
    if host in EVERYWHERE:
        option = ", or give --hub host:port" if section == "[hub]" else ""
        raise ConfigError(f"{section} listens everywhere but has no name; set its names{option}")
    port = config.outside_port if isinstance(config, DoorConfig) else config.port
    return f"{host}:{port}"


def farm_of(certificate: bytes) -> str:
    """The name in a certificate."""
    return common_name(parse_certificate(certificate, "the certificate").subject)
