"""The reference forward pass: a checkpoint's or a GGUF's logits, from weights that are read as they are needed."""

from dsv4tools.model.generate import generate
from dsv4tools.model.model import Cache, Model
from dsv4tools.model.open import open_model
from dsv4tools.model.sampling import Sampling

__all__ = ["Cache", "Model", "Sampling", "generate", "open_model"]
