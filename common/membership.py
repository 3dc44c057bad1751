"""What a farm is given when it joins a network: one JSON file, carried by hand or by enrolment."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from common.errors import ConfigError, first_fault
from common.messages import FarmName
from common.signing import Document, NetworkName

Address = Annotated[str, Field(pattern=r"^[^\s:/]+:\d{1,5}$")]
MAX_BYTES = 1_000_000


class Membership(Document):
    """A certificate for the farm's own key, the network's authority and signing keys, addresses."""

    format: Literal[1] = 1
    network: NetworkName
    farm: FarmName
    hub: Address | None
    door: Address | None = None
    certificate: str
    authority: str
    keys: str

    @classmethod
    def load(cls, path: Path) -> "Membership":
        """Read the file.

        Raises:
            ConfigError: there is none, or it is not what a server writes; names it.
        """
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ConfigError(f"'{path}' is too long for a membership")
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"no membership at '{path}': {error.strerror or error}") from error
        except ValidationError as error:
            raise ConfigError(
                f"'{path}' is no membership: {first_fault(error)}; ask the server for it again "
                "with: fieldfed-server certify"
            ) from error
