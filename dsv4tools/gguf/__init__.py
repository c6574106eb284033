"""GGUF containers: a strict reader and a header encoder. Nothing here knows a model."""
