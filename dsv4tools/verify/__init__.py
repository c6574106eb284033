"""Verification: structure, comparison with the source by bytes and by value, hashes, behaviour, and the report."""

from dsv4tools.verify.data import report_data
from dsv4tools.verify.report import Behaviour, DepthCheck, Fault, ManifestCheck, Report, TensorCheck
from dsv4tools.verify.run import verify

__all__ = [
    "Behaviour", "DepthCheck", "Fault", "ManifestCheck", "Report", "TensorCheck", "report_data", "verify",
]
