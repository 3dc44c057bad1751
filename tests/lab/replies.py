"""Replies that somebody other than a farm fills in."""

from typing import Any

from common.messages import AlignReply, Array

DIGEST = "ab" * 32


def align_reply(update: Array, **values: Any) -> AlignReply:
    """A reply of alignment with this coded update, uint8 (m,); what is not given is plausible."""
    plausible: dict[str, Any] = {
        "run": 1,
        "round": 1,
        "attempt": 1,
        "farm": "oak",
        "base": DIGEST,
        "mask": DIGEST,
        "examples": 10,
        "accuracy": 0.5,
        "f1": 0.5,
        "loss": 1.0,
        "dal": 0.0,
        "steps": 1,
        "train_seconds": 0.5,
        "seconds": 1.0,
    }
    return AlignReply(**{**plausible, "update": update, **values})
