"""The header of a safetensors file, read without its tensors: 8 bytes of length, then JSON."""

import json
from typing import Any

MAX_HEADER_BYTES = 1 << 20


def header_of(data: bytes) -> tuple[dict[str, Any], int]:
    """Entries by name with ``__metadata__``, and the offset at which the tensors begin.

    Raises:
        ValueError: these bytes do not begin with such a header.
    """
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("a header that is no JSON object")
    return header, 8 + length
