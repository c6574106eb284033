"""From a checkpoint to everything a GGUF says before its weights, by the tables in templates/."""

from dsv4tools.template.template import Template, apply_template, apply_template_file, derive_template
from dsv4tools.template.tensors import TemplateTensor

__all__ = ["Template", "TemplateTensor", "apply_template", "apply_template_file", "derive_template"]
