"""Text to token ids and back, from a checkpoint's tokenizer.json or from the metadata of a GGUF, with the same ids."""

from dsv4tools.tokenizer.load import load_tokenizer
from dsv4tools.tokenizer.tokenizer import TextStream, Tokenizer

__all__ = ["TextStream", "Tokenizer", "load_tokenizer"]
