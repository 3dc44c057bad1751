"""The front door of a network: settings, and what both sides say at it beside Flower's words.

POST /v1/fleet/...   Flower's Fleet API, for a farm that shows its certificate
POST /v1/join        a device without one asks for it, with a code (common/code.py)
POST /v1/renew       a farm asks for a new certificate with its old one
POST /v1/leave       a farm gives its certificates back
POST /v1/check       a farm asks whether all is well, and, with a body, which release is there
"""

from pydantic import AwareDatetime, Field

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
    connections: int = Field(default=2048, ge=1, le=100_000, description="open at once")
    connections_per_farm: int = Field(
        default=16, ge=2, le=1000, description="of those, by one farm"
    )
    requests_per_second: float = Field(
        default=50.0, gt=0, le=10_000, description="of each farm, beyond a burst; more wait"
    )


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
