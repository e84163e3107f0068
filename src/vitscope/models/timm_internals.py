"""Private interfaces of timm and of the client of its model hub: the only module that touches them.

`tests/contracts/test_timm.py` states what each of them has to do. On a new release of either, run ``make test-newest``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants


def hub_address() -> str:
    """Return the address of the model hub."""
    return constants.ENDPOINT


@contextmanager
def offline_hub(offline: bool) -> Iterator[None]:
    """Let the hub's client use its cache only where ``offline`` is True.

    The environment variable ``HF_HUB_OFFLINE`` is public, but is read when the client is imported, which timm does.
    """
    previous = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = previous or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = previous
