"""Settings of what runs beside Flower: where each listens. The door's are in common/door.py."""

from pydantic import Field

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
