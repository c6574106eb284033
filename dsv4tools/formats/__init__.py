"""Number formats: the table of ggml types, what a checkpoint stores, and bit-exact encoders and decoders.

`table` and `source` are plain data; `codecs` is what the rest of the program calls. The other modules hold kernels:
importing one compiles it, so let `codecs` do that.
"""
