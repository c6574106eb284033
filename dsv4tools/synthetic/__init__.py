"""Made-up checkpoints in DeepSeek's published layout: for the quickstart, the tests and the benchmarks."""

from dsv4tools.synthetic.checkpoint import write_checkpoint, write_full_width, write_sparse
from dsv4tools.synthetic.layout import inventory
from dsv4tools.synthetic.shapes import FLASH, FLASH_0731, PRO, TINY, Shape, make_config

__all__ = [
    "FLASH",
    "FLASH_0731",
    "PRO",
    "TINY",
    "Shape",
    "inventory",
    "make_config",
    "write_checkpoint",
    "write_full_width",
    "write_sparse",
]
