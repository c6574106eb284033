"""Judging a header by a profile: would the engine load it, and compute what it says. Reads no file, prints nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4tools.engines.checks import either
from dsv4tools.engines.header import SPLIT_COUNT, read_dimensions
from dsv4tools.engines.metadata import CONVERT_AGAIN, Metadata, judge_shape, judge_values
from dsv4tools.engines.tensors import judge_tensors
from dsv4tools.engines.verdict import SEVERITIES, EngineFinding, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dsv4tools.engines.header import Header
    from dsv4tools.engines.profile import Profile


def judge(profile: Profile, header: Header) -> Verdict:
    """What the engine of `profile` would do with `header`.

    InputError if the profile compares values that cannot be compared.
    """
    metadata = Metadata(profile, header)
    findings = [*_judge_container(profile, header)]
    shape, other_shape = judge_shape(metadata)
    if other_shape is not None:
        findings.append(other_shape)   # an engine that does not know the model has nothing to say about the rest
    else:
        findings += [*metadata.findings, *judge_values(metadata, shape)]
        config = read_dimensions(header, profile)
        draft = _find_draft(profile, header)
        if draft is not None:
            findings.append(draft)
        elif config is not None:
            findings += judge_tensors(profile, header, config)
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return Verdict(profile.name, profile.commit, profile.evidence, tuple(findings))


def _find_draft(profile: Profile, header: Header) -> EngineFinding | None:
    """That the file has layers whose tensors the profile does not describe, and perhaps no others."""
    if profile.draft is None:
        return None
    n = header.values.get(profile.key(profile.draft.count), 0)
    n_layers = header.values.get(profile.key("block_count"))
    if type(n) is not int or type(n_layers) is not int or not 0 < n <= n_layers:
        return None
    name = profile.draft.tensor.format(layer=n_layers - n)
    if name not in header.tensors:
        return None
    return EngineFinding("note", name, "a layer that predicts further tokens", "the model's own layers",
                         effect=profile.draft.effect)


def _judge_container(profile: Profile, header: Header) -> Iterator[EngineFinding]:
    if header.version not in profile.gguf_versions:
        yield EngineFinding("refuse", "GGUF version", str(header.version), either(map(str, profile.gguf_versions)),
                            profile.messages.version, remedy=CONVERT_AGAIN)
    n_parts = header.values.get(SPLIT_COUNT, 0)
    if not profile.splits and isinstance(n_parts, int) and n_parts > 1:
        yield EngineFinding("refuse", SPLIT_COUNT, str(n_parts), "a single file", profile.messages.splits,
                            remedy="merge the parts first: dsv4tools convert PART OUT.gguf --policy keep")
