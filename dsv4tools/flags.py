"""The C quantizer's family flags as policy rules, so that its users can move over.

The specific stands before the general, in whatever order they were typed. Membership differs from the C tool's in one
place, on purpose: there ``--attention-proj`` also hits ``indexer.attn_q_b``, which ds4 then refuses to load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4tools.errors import InputError, UsageError
from dsv4tools.formats.table import find_format
from dsv4tools.policy import KEEP_WORDS, Rule, check_glob, is_glob

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Flag -> the tensors of its family, in the order in which they are asked.
FAMILIES: dict[str, tuple[str, ...]] = {
    "routed-w1": ("blk.*.ffn_gate_exps.weight",),
    "routed-w2": ("blk.*.ffn_down_exps.weight",),
    "routed-w3": ("blk.*.ffn_up_exps.weight",),
    "experts": ("blk.*.ffn_*_exps.weight",),
    "attention-proj": ("blk.*.attn_q_a.weight", "blk.*.attn_q_b.weight", "blk.*.attn_kv.weight",
                       "blk.*.attn_output_?.weight"),
    "attention": ("blk.*.attn_*", "blk.*.indexer.*", "blk.*.indexer_*"),
    "shared": ("blk.*.ffn_*_shexp.weight",),
    "output": ("output.weight",),
    "embedding": ("token_embd.weight",),
    "dense": ("token_embd.weight", "output.weight", "output_hc_fn.weight", "blk.*.hc_*", "blk.*.attn_*",
              "blk.*.indexer.*", "blk.*.indexer_*", "blk.*.ffn_gate_inp.weight", "blk.*.ffn_*_shexp.weight"),
}
# A star crosses dots, so `blk.*.attn_q_b.weight` alone would take `blk.2.indexer.attn_q_b.weight` too.
EXCLUDED = {"attention-proj": ("blk.*.indexer.*",)}


def rules_from_flags(families: Mapping[str, str | None], tensor_types: Sequence[str] = ()) -> list[Rule]:
    """Rules for ``--FAMILY TYPE`` flags and ``--tensor-type NAME=TYPE`` entries.

    A NAME with a wildcard is a glob; without one it is a tensor's name, or the dotted beginning of several
    (``blk.3`` means layer 3, and not layer 30). Names go before globs, longer ones before shorter ones; of two globs of
    one length the first.

    Raises
    ------
    UsageError
        An unknown type or family, a NAME that no tensor can have, or an entry without ``=``.
    """
    rules = sorted(map(_tensor_rule, tensor_types), key=lambda rule: (is_glob(rule.tensors[0]), -len(rule.tensors[0])))
    unknown = set(families) - set(FAMILIES)
    if unknown:
        raise UsageError("flags", f"unknown tensor family {min(unknown)!r}, known are {', '.join(FAMILIES)}")
    for family, globs in FAMILIES.items():
        name = families.get(family)
        if name is not None:
            rules.append(_rule(globs, name, f"--{family}", EXCLUDED.get(family, ()), optional=True))
    return rules


def _tensor_rule(entry: str) -> Rule:
    name, equals, type_name = entry.rpartition("=")
    if not equals or not name:
        raise UsageError("--tensor-type", f"{entry!r} is not NAME=TYPE", hint="for example blk.3.attn_kv.weight=f16")
    try:
        check_glob(name, "--tensor-type")
    except InputError as e:
        raise UsageError(e.where, e.what, hint=e.hint) from None
    globs = (name,) if is_glob(name) else (name, f"{name.rstrip('.')}.*")
    return _rule(globs, type_name, f"--tensor-type {name}", (), optional=False)


def _rule(globs: tuple[str, ...], type_name: str, flag: str, excluded: tuple[str, ...], *, optional: bool) -> Rule:
    if type_name.lower() in (*KEEP_WORDS, "copy"):
        return Rule(globs, None, optional=optional, label=flag, excluded=excluded)
    try:
        chosen = find_format(type_name)
    except UsageError as e:
        raise UsageError(flag, e.what) from None
    return Rule(globs, chosen, optional=optional, label=flag, excluded=excluded)
