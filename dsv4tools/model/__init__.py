"""The reference forward pass: a checkpoint's or a GGUF's logits, from weights that are read as they are needed."""
