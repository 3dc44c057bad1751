"""Settings of what runs beside Flower: where each listens. The door's are in common/door.py."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from common.processes import require_loopback
from common.section import Section


class HubConfig(Section):
    """Where devices get models, over mutual TLS."""

    host: str = Field(default="127.0.0.1", description="to listen on; 0.0.0.0: everywhere")
    port: int = Field(ge=1, le=65535, description="to listen on; the door's is another")
    names: tuple[str, ...] = Field(
        default=(), description="names and addresses by which devices reach it"
    )
    streams: int = Field(default=256, ge=1, le=10_000, description="devices sent to at once")
    streams_per_farm: int = Field(default=4, ge=1, le=10_000, description="of those, to one farm")
    bytes_per_second: float | None = Field(default=None, gt=0, description="to each farm")


class MetricsConfig(Section):
    """Where Prometheus reads figures, without encryption and so from this machine alone."""

    host: str = Field(default="127.0.0.1", description="to listen on")
    port: int = Field(default=9464, ge=1, le=65535, description="to listen on")


class DeviceMetricsConfig(MetricsConfig):
    """Where Prometheus reads a device's figures: not the server's port, for both may be here."""

    port: int = Field(default=9466, ge=1, le=65535, description="to listen on")


class PageConfig(Section):
    """Where operators look, without encryption and so from this machine alone."""

    host: str = Field(default="127.0.0.1", description="to listen on")
    port: int = Field(default=9465, ge=1, le=65535, description="to listen on")
    contained: bool = Field(
        default=False,
        description="in a container: any host will do, for the port is published to loopback alone",
    )

    @property
    def address(self) -> str:
        """Where a browser on this machine finds it."""
        return f"http://{'localhost' if self.contained else self.host}:{self.port}/"


def require_near(shown: MetricsConfig | PageConfig, section: str) -> None:
    """Refuse to show anything to other machines; a container may be what keeps them out.

    Raises:
        ConfigError: other machines could look; names the setting.
    """
    if not (isinstance(shown, PageConfig) and shown.contained):
        require_loopback(shown.host, f"{section} host")


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")]


class RegionConfig(Section):
    """A server that is a region of a larger network: who its centre is, and where it listens."""

    centre: Name = Field(description="network of the centre, by the certificate that it shows")
    host: str = Field(default="127.0.0.1", description="to listen on; 0.0.0.0: everywhere")
    port: int = Field(ge=1, le=65535, description="to listen on")
    names: tuple[str, ...] = Field(
        default=(), description="names and addresses by which the centre reaches it"
    )
    fewest: int = Field(
        default=3, ge=1, le=10_000, description="farms without which no record leaves the region"
    )


class RegionEntry(Section):
    """A region, in the settings of its centre."""

    name: Name = Field(description="of the region's network")
    address: str = Field(pattern=r"^[^\s:/]+:\d{1,5}$", description="host:port of its [region]")
    member: Path = Field(description="what the region's operator got from certify; pins its keys")
