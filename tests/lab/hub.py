"""A hub that really listens, with mutual TLS, in a thread of the test."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client.device import Device
from client.hub import HubClient
from client.identity import ClientFiles, FarmIdentity
from common.membership import Membership
from common.processes import free_port
from common.services import HubConfig
from server import offers
from server.hub import serve_hub
from server.identity import Authority
from tests.lab.versions import NETWORK

START_SECONDS = 20.0
LOOK_SECONDS = 0.1
"""Tests have no time to wait a second for the hub to look into its registry."""


class LabHub:
    """The hub of the registry in a folder; :meth:`running` starts it, also again."""

    def __init__(self, folder: Path, **limits: float) -> None:
        self.folder = folder
        values = {"host": "127.0.0.1", "port": free_port("127.0.0.1")} | limits
        self.config = HubConfig.model_validate(values)
        self.address = f"127.0.0.1:{self.config.port}"
        self.authority = Authority.create(folder / "identity", NETWORK, [])

    def files(self, farm: str = "apple") -> ClientFiles:
        """The certificate of a farm of this network."""
        identity = FarmIdentity.create(self.folder / "farms" / farm, farm)
        ca = self.authority.server_credentials().ca
        identity.accept(self.authority.sign(identity.request()), ca)
        return identity.credentials()

    def join(self, device: Device, farm: str, keys: str) -> None:
        """Make a farm's device a member of this network, whose signing keys are ``keys``."""
        certificate = self.authority.sign(device.identity.request())
        device.join(
            Membership(
                network=NETWORK,
                farm=farm,
                hub=self.address,
                certificate=certificate.decode(),
                authority=self.authority.server_credentials().ca.decode(),
                keys=keys,
            )
        )

    def client(self, farm: str = "apple") -> HubClient:
        """A device of a farm."""
        return HubClient(self.address, self.files(farm), seed=0)

    @contextmanager
    def running(self) -> Iterator["LabHub"]:
        """Serve while the context is open."""
        offers.LOOK_SECONDS = LOOK_SECONDS
        loop, ready = asyncio.new_event_loop(), threading.Event()
        until, failed = asyncio.Event(), []

        async def serve() -> None:
            task = loop.create_task(
                serve_hub(
                    self.config, self.folder, self.authority.server_credentials(), until, ready.set
                )
            )
            try:
                await task
            except BaseException as error:
                failed.append(error)
                raise
            finally:
                ready.set()

        thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
        thread.start()
        assert ready.wait(START_SECONDS)
        assert not failed, failed
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(until.set)
            thread.join(START_SECONDS)
            loop.close()
