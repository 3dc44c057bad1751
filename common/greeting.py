"""Says hello to a broker, as a doctor does: does it let us in, and why not.

A broker has one connection for each name. Where a program of ours has that connection, another
hello would end it, so then only the line and TLS are tried. Else the session that the broker keeps
for us is taken up and left as it is: nothing that comes is acknowledged, nothing is published.
"""

import contextlib
import socket
import ssl
import time
from collections.abc import Iterator

from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.reasoncodes import ReasonCode

from common.broker import Broker
from common.diagnosis import Finding, fault, ok
from common.errors import FieldfedError, LinkError
from common.mqtt import OLD_BROKER, client_of, name_of, options_of, remedy_for
from common.session import CONNECT_SECONDS, RefusedError

TURN_SECONDS = 0.2
ALERT_SECONDS = 1.0
"""In which a broker says that it does not take our certificate: TLS 1.3 says so afterwards."""


def broker_findings(
    broker: Broker, network: str, name: str, session_seconds: int, holder: str | None
) -> Iterator[Finding]:
    """What a doctor says of a broker.

    Args:
        broker: where to.
        network: its name.
        name: of the device, or of the server.
        session_seconds: as its own program asks for.
        holder: our program that has the connection of this name now, if one does.
    """
    place = f"{broker.host}:{broker.port}"
    try:
        if holder is not None:
            knock(broker)
        else:
            greet(broker, network, name, session_seconds)
    except FieldfedError as error:
        remedy = remedy_for(error) or "see that the broker runs, and that [broker] names it"
        yield fault("broker", f"{place}: {error}", remedy)
        return
    how = "lets us in" if holder is None else f"can be reached; {holder} has the connection"
    yield ok("broker", f"{place} {how}")


def greet(broker: Broker, network: str, name: str, session_seconds: int) -> None:
    """Be let in, and go.

    Args:
        broker: where to.
        network: its name.
        name: of the device, or of the server.
        session_seconds: as its own program asks for.

    Raises:
        LinkError: the broker cannot be reached, or does not let us in.
        ConfigError: files of TLS cannot be used.
    """
    knock(broker)  # paho would wait for a silent one as long as its keepalive
    try:
        _greet(broker, name_of(network, name), MQTTProtocolVersion.MQTTv5, session_seconds)
    except RefusedError as error:
        if error.reason != OLD_BROKER:
            raise
        _greet(broker, name_of(network, name), MQTTProtocolVersion.MQTTv311, session_seconds)


def _greet(broker: Broker, name: str, protocol: MQTTProtocolVersion, session: int) -> None:
    client, said = client_of(broker, name, protocol, session), list[ReasonCode]()
    client.manual_ack_set(True)
    client.on_connect = lambda _client, _data, _flags, reason, _also: said.append(reason)
    until = time.monotonic() + CONNECT_SECONDS
    try:
        client.connect(
            broker.host, broker.port, broker.keepalive, **options_of(protocol, session, most=1)
        )
        while not said and client.socket() is not None and time.monotonic() < until:
            client.loop(TURN_SECONDS)
        if said and not said[0].is_failure:
            client.disconnect()
    except (OSError, ValueError) as error:
        raise LinkError(str(error)) from error
    finally:
        if (line := client.socket()) is not None:
            line.close()
    if not said:
        raise LinkError("no answer to CONNECT")
    if said[0].is_failure:
        raise RefusedError(said[0])


def knock(broker: Broker) -> None:
    """See that the line and TLS stand, without a name; raises as :func:`greet`."""
    context = broker.tls()
    try:
        with contextlib.ExitStack() as stack:
            where = (broker.host, broker.port)
            line = stack.enter_context(socket.create_connection(where, CONNECT_SECONDS))
            if context is None:
                return
            tls = stack.enter_context(context.wrap_socket(line, server_hostname=broker.host))
            tls.settimeout(ALERT_SECONDS)
            with contextlib.suppress(TimeoutError, ssl.SSLEOFError):
                tls.recv(1)
    except OSError as error:
        raise LinkError(str(error)) from error
