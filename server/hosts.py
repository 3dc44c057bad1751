"""Names and addresses by which a server is reached, as its certificate has them."""

import contextlib
import ipaddress
import re
from collections.abc import Sequence

from cryptography import x509

from common.errors import ConfigError

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
# the last label has a letter: 10.0.0.300 is a mistyped address and no name
_DNS_NAME = re.compile(rf"(?=.{{1,253}}$)(?:{_LABEL}\.)*(?=[^.]*[A-Za-z][^.]*$){_LABEL}")


def names_of(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """The hosts and this machine itself, each once; raises ConfigError where one is no host."""
    return list(dict.fromkeys(_name(host) for host in ("localhost", "127.0.0.1", *hosts)))


def _name(host: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    if not _DNS_NAME.fullmatch(host):
        raise ConfigError(
            f"host {host!r} is neither a DNS name nor an IP address; write it without scheme, port "
            "or path"
        )
    return x509.DNSName(host.lower())


def names_in(certificate: x509.Certificate) -> list[x509.GeneralName]:
    """What a certificate covers; nothing where it says nothing."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return list(found.value)
