"""Zstandard where it pays: bytes travel compressed when that is shorter, and as they are when not.

The two are told apart by the frame's magic, which nothing else that travels begins with.
"""

import numpy as np
import zstandard

from common.codec import Bytes
from common.errors import ProtocolError, RejectReason

LEVEL, FAST = 9, 3
"""Of 1 to 22; coded numbers have little more to give above 9. FAST is for what is sent often."""


def compress(data: Bytes) -> Bytes:
    """uint8 of ``data`` or of a frame that holds it, whichever is shorter."""
    # one-shot frames say how long their content is, which the receiver relies on
    frame = zstandard.ZstdCompressor(level=LEVEL).compress(data.data)
    return np.frombuffer(frame, np.uint8) if len(frame) < data.size else data


def compressed_piece(piece: bytes) -> bytes | None:
    """A frame that holds a piece of a file, or None where it would save less than a twentieth."""
    frame = zstandard.ZstdCompressor(level=FAST).compress(piece)
    return frame if len(frame) < 0.95 * len(piece) else None


def expand(data: Bytes, limit: int) -> Bytes:
    """Inverse of :func:`compress`; allocates no more than ``limit`` bytes, whatever comes in.

    Raises:
        ProtocolError: a damaged frame, or OVERSIZED where it holds more than ``limit`` bytes.
    """
    if data[: len(zstandard.FRAME_HEADER)].tobytes() != zstandard.FRAME_HEADER:
        return data
    try:
        size = zstandard.frame_content_size(data.data)
        if not 0 <= size <= limit:
            raise ProtocolError(
                f"a compressed body holds {'?' if size < 0 else size} bytes, at most {limit} pass",
                RejectReason.OVERSIZED,
            )
        content = zstandard.ZstdDecompressor().decompress(data.data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ProtocolError(f"a compressed body is damaged: {error}") from error
    return np.frombuffer(content, np.uint8)
