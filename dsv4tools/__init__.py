"""dsv4tools: DeepSeek-V4 checkpoints to GGUF, and the proof that they are right."""

__version__ = "0.1.0"
