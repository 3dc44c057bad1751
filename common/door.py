"""The front door of a network: settings, and what both sides say at it beside Flower's words.

POST /v1/fleet/...   Flower's Fleet API, for a farm that shows its certificate
POST /v1/join        a device without one asks for it, with a code (common/code.py)
POST /v1/renew       a farm asks for a new certificate with its old one
POST /v1/leave       a farm gives its certificates back
POST /v1/check       a farm asks whether all is well, and, with a body, which release is there
"""

from typing import Self

from pydantic import AwareDatetime, Field, model_validator

from common.processes import is_loopback
from common.section import Section
from common.signing import Document

FLEET, JOIN, RENEW = "/v1/fleet/", "/v1/join", "/v1/renew"
LEAVE, CHECK = "/v1/leave", "/v1/check"
PORT = 8443


class DoorConfig(Section):
    """Where farms on other machines come in, over mutual TLS."""

    host: str = Field(default="127.0.0.1", description="to listen on; 0.0.0.0: everywhere")
    port: int = Field(default=PORT, ge=1, le=65535, description="to listen on")
    names: tuple[str, ...] = Field(
        default=(), description="names and addresses by which farms reach it"
    )
    proxy_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="by which farms reach a TCP proxy before the door, which says who calls by the "
        "PROXY protocol; without one they come to port",
    )
    connections: int = Field(default=2048, ge=1, le=100_000, description="open at once")
    connections_per_farm: int = Field(
        default=16, ge=2, le=1000, description="of those, by one farm"
    )
    requests_per_second: float = Field(
        default=50.0, gt=0, le=10_000, description="of each farm, beyond a burst; more wait"
    )

    @property
    def outside_port(self) -> int:
        """By which farms come in."""
        return self.proxy_port or self.port

    @model_validator(mode="after")
    def _reached_by_the_proxy_alone(self) -> Self:
        if self.proxy_port is not None and not is_loopback(self.host):
            raise ValueError(
                f"with proxy_port, host has to be of this machine, such as 127.0.0.1, not "
                f"'{self.host}': who reaches the door past the proxy could say that it is anybody"
            )
        return self


class Checking(Document):
    """What a farm may say when it asks: older releases ask without, and know no other answer."""

    versions: bool = False


class Checked(Document):
    """What the door says to a farm that asks whether all is well; versions only when asked."""

    farm: str
    expires: AwareDatetime
    superlink: bool
    protocol: int | None = None
    release: str | None = None
