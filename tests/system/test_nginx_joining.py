"""A real nginx before the door: every test of joining once more.

A code is bound to the certificate that the door shows, so these would fail if TLS ended earlier.
"""

from tests.client.test_joining import *  # noqa: F403  every test of joining
from tests.system.nginx import behind_nginx, marks

__all__ = ["behind_nginx"]
pytestmark = marks
