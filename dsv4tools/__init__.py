"""dsv4tools: DeepSeek-V4 checkpoints to GGUF, and the proof that they are right.

    import dsv4tools as dt
    checkpoint = dt.open_checkpoint(directory)
    plan = dt.plan(checkpoint, policy="q4k")
    dt.convert(plan, "out.gguf")
    dt.verify("out.gguf", source=checkpoint).ok

Nothing here prints or exits; errors are the classes of `dsv4tools.errors`.
"""

__version__ = "0.1.0"

from dsv4tools.checkpoint import Checkpoint
from dsv4tools.collect import Collection, collect_imatrix
from dsv4tools.compare import Comparison, compare
from dsv4tools.convert import Conversion, convert
from dsv4tools.diff import Difference, diff
from dsv4tools.errors import Dsv4Error, InputError, ResourceError, UsageError, VerifyError
from dsv4tools.formats.codecs import dequantize, quantize
from dsv4tools.imatrix import Imatrix, ImatrixFile, open_imatrix, write_imatrix
from dsv4tools.model import Model, Sampling, generate, open_model
from dsv4tools.plan import Plan
from dsv4tools.plan import make_plan as plan
from dsv4tools.policy import Policy, list_policies, load_policy
from dsv4tools.reroute import Rerouted, reroute, reroute_checkpoint, reroute_gguf
from dsv4tools.sources import open_source
from dsv4tools.sources import open_source as open_checkpoint
from dsv4tools.verify import Report, verify

__all__ = [
    "Checkpoint", "Collection", "Comparison", "Conversion", "Difference", "Dsv4Error", "Imatrix", "ImatrixFile",
    "InputError", "Model", "Plan", "Policy", "Report", "Rerouted", "ResourceError", "Sampling", "UsageError",
    "VerifyError", "collect_imatrix", "compare", "convert", "dequantize", "diff", "generate", "list_policies",
    "load_policy", "open_checkpoint", "open_imatrix", "open_model", "open_source", "plan", "quantize", "reroute",
    "reroute_checkpoint", "reroute_gguf", "verify", "write_imatrix",
]
