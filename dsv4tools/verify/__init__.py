"""Verification: structure, and comparison with the source."""

from dsv4tools.verify.report import Report, TensorCheck
from dsv4tools.verify.run import verify

__all__ = ["Report", "TensorCheck", "verify"]
