"""Conversations: what is said, and by whom."""

from typing import NamedTuple

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """What one side says: ``role`` is one of ``ROLES``."""

    role: str
    content: str
