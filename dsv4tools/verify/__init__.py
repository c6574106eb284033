"""Verification: structure, and comparison with the source."""

from dsv4tools.verify.report import Behaviour, DepthCheck, Fault, ManifestCheck, Report, TensorCheck
from dsv4tools.verify.run import verify

__all__ = ["Behaviour", "DepthCheck", "Fault", "ManifestCheck", "Report", "TensorCheck", "verify"]
