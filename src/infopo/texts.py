"""Prompts and responses as people write them. Imports nothing, so that what only reads them need not load torch."""

from typing import Any

Message = dict[str, Any]
"""A turn of a conversation: `{"role": ..., "content": ...}`."""

Text = str | list[Message]
"""A prompt or a response: plain text, or the turns of a conversation."""
