"""dsv4tools: DeepSeek-V4 checkpoints to GGUF, and the proof that they are right.

    import dsv4tools as dt
    checkpoint = dt.open_checkpoint(directory)
    plan = dt.plan(checkpoint, policy="q4k")
    dt.convert(plan, "out.gguf")
    dt.verify("out.gguf", source=checkpoint).ok

Nothing here prints or exits; errors are the classes of `dsv4tools.errors`.
"""

__version__ = "0.1.0"

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4tools.checkpoint import Checkpoint
    from dsv4tools.collect import Collection, collect_imatrix
    from dsv4tools.compare import Comparison, compare
    from dsv4tools.convert import Conversion, convert
    from dsv4tools.diff import Difference, diff
    from dsv4tools.errors import Dsv4Error, InputError, ResourceError, UsageError, VerifyError
    from dsv4tools.formats.codecs import dequantize, quantize
    from dsv4tools.imatrix import Imatrix, ImatrixFile, open_imatrix, write_imatrix
    from dsv4tools.model import Model, Sampling, open_model
    from dsv4tools.model.generate import generate
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

# Module -> the public names that it defines ("public=its own name"). They are loaded when they are asked for: the
# command line needs few of them, and the whole library takes longer to import than `inspect` to run.
_PLACES = {
    "checkpoint": "Checkpoint",
    "collect": "Collection collect_imatrix",
    "compare": "Comparison compare",
    "convert": "Conversion convert",
    "diff": "Difference diff",
    "errors": "Dsv4Error InputError ResourceError UsageError VerifyError",
    "formats.codecs": "dequantize quantize",
    "imatrix": "Imatrix ImatrixFile open_imatrix write_imatrix",
    "model": "Model Sampling generate open_model",
    "plan": "Plan plan=make_plan",
    "policy": "Policy list_policies load_policy",
    "reroute": "Rerouted reroute reroute_checkpoint reroute_gguf",
    "sources": "open_source open_checkpoint=open_source",
    "verify": "Report verify",
}
_PLACE_OF = {entry.partition("=")[0]: (module, entry.rpartition("=")[2])
             for module, entries in _PLACES.items() for entry in entries.split()}


class _Package(ModuleType):
    """The package, whose public names load their modules."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  - they are of many types
        if name not in _PLACE_OF:
            raise AttributeError(f"module 'dsv4tools' has no attribute {name!r}")
        module, its_name = _PLACE_OF[name]
        value = getattr(importlib.import_module(f"dsv4tools.{module}"), its_name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:  # noqa: ANN401  - see above
        # The import system binds a module to its package: dsv4tools.convert would be that and not the function.
        if not (name in _PLACE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
