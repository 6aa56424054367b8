"""Architectures that have no bridge here, and why: named to whoever asks for one, and listed in docs/models.md."""

UNSUPPORTED: dict[str, str] = {}
