"""Fewer experts per token: the view of a checkpoint, and writing it out as a checkpoint or from GGUF to GGUF."""

from dsv4tools.reroute.directory import Rerouted, reroute_checkpoint
from dsv4tools.reroute.gguf import reroute_gguf
from dsv4tools.reroute.view import reroute

__all__ = ["Rerouted", "reroute", "reroute_checkpoint", "reroute_gguf"]
