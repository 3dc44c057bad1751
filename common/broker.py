"""Where the MQTT broker of a network is, and how TLS to it is set up."""

import ssl
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, model_validator

from common.errors import ConfigError
from common.section import Section


class _Line(ssl.SSLSocket):
    """Closed when the handshake fails, which paho forgets."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except BaseException:
            self.close()
            raise


class Broker(Section):
    """Where the broker of a network is; TLS is on when ``ca`` is given."""

    host: Annotated[str, Field(min_length=1, description="name or address of the broker")]
    ca: Path | None = Field(default=None, description="PEM of the authority that vouches for it")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(
        default_factory=lambda known: 8883 if known.get("ca") else 1883,
        description="unset: 8883 with 'ca', else 1883",
    )
    username: str | None = Field(default=None, description="where no certificate is shown")
    password: SecretStr | None = Field(default=None, description="of that user")
    certificate: Path | None = Field(default=None, description="PEM of our own, with 'key'")
    key: Path | None = Field(default=None, description="PEM that goes with 'certificate'")
    keepalive: Annotated[int, Field(ge=5, le=3600)] = Field(
        default=60, description="seconds between signs of life"
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("'certificate' and 'key' go together")
        if self.certificate is not None and self.ca is None:
            raise ValueError("'certificate' needs 'ca'")
        if self.password is not None and self.username is None:
            raise ValueError("'password' needs 'username'")
        return self

    def tls(self) -> ssl.SSLContext | None:
        """What TLS goes by, read anew so that files may be renewed; nothing without ``ca``.

        Raises:
            ConfigError: a file is missing or is not what it should be.
        """
        if self.ca is None:
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.sslsocket_class = _Line
            if self.certificate is not None:
                context.load_cert_chain(self.certificate, self.key)
        except OSError as error:
            files = ", ".join(f"'{one}'" for one in (self.ca, self.certificate, self.key) if one)
            raise ConfigError(f"[broker] {files} cannot be used for TLS: {error}") from error
        return context
