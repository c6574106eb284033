"""The chat format of DeepSeek-V4: conversations to prompts, completions back to messages.

DeepSeek publishes no chat template for this model but a Python encoder (``encoding/encoding_dsv4.py`` in the model's
repository). Functions and arguments have its names; texts are the same, byte for byte. Input that it would render to
nonsense or lose (see docs/chat.md) is an error here.
"""

from dsv4tools.chat.encode import encode_messages
from dsv4tools.chat.parse import parse_message_from_completion_text
from dsv4tools.chat.request import messages_from_request

__all__ = ["encode_messages", "messages_from_request", "parse_message_from_completion_text"]
