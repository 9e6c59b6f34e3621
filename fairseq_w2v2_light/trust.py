"""Whether checkpoints may run code when they are loaded: only those of a user who says so."""

import contextlib
import os
from typing import Iterator

# the environment variable with which a user trusts the checkpoints that she loads, and the option of the verbs
TRUST = "W2V2_LIGHT_TRUST_CHECKPOINTS"
TRUST_OPTION = "--trust-checkpoint"
TRUST_HELP = (
    f"let the checkpoint run the code that it may hold (as {TRUST}=1 does): for an old one of fairseq that is refused "
    "for a type, and only if you know and trust who made it"
)


def trusts_checkpoints() -> bool:
    """Whether the user said that checkpoints may run code: W2V2_LIGHT_TRUST_CHECKPOINTS=1."""
    return os.environ.get(TRUST, "") not in ("", "0")


@contextlib.contextmanager
def trusting_checkpoints() -> Iterator[None]:
    """Sets W2V2_LIGHT_TRUST_CHECKPOINTS=1 for the block, in this process and in those that it starts."""
    before = os.environ.get(TRUST)
    os.environ[TRUST] = "1"
    try:
        yield
    finally:
        os.environ.pop(TRUST)
        if before is not None:
            os.environ[TRUST] = before
