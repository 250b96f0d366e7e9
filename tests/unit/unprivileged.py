"""The tests run as root, whom the modes of files do not concern."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_NOBODY = 65534


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user whom the modes of files concern, which is not root."""
    user = os.getuid()
    if user == 0:
        os.setresuid(_NOBODY, _NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(user, user, user)
