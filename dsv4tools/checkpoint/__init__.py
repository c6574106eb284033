"""Opening and strictly validating checkpoints: safetensors, config, tokenizer; raw bytes out."""

from dsv4tools.checkpoint.checkpoint import Checkpoint, SourceTensor, open_checkpoint
from dsv4tools.checkpoint.config import Config

__all__ = ["Checkpoint", "Config", "SourceTensor", "open_checkpoint"]
