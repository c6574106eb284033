"""From the bytes of a file to its header: metadata, tensor table, and whether the data section fits the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dsv4tools.errors import InputError
from dsv4tools.formats.table import BY_ID, REMOVED_IDS
from dsv4tools.gguf import rules
from dsv4tools.gguf.header import TensorInfo
from dsv4tools.gguf.regular import read_into
from dsv4tools.gguf.rules import Fault, pad
from dsv4tools.gguf.values import KV
from dsv4tools.gguf.window import HeaderWindow, Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_MAX_FINDINGS = 10_000             # a hostile table must not become a bigger list of complaints
_MAX_PADDING_READS = 1024
_MIN_KV_BYTES = 8 + 4 + 1          # key length, type, value
_MIN_TENSOR_BYTES = 8 + 4 + 4 + 8  # name length, number of dimensions, type, offset


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong or odd in a file.

    Attributes
    ----------
    severity:
        ``error`` or ``warning``.
    code:
        Short stable slug: ``tensor-offset``.
    where:
        Metadata key, tensor name, or part of the file.
    message:
        What was found and what was expected.
    offset:
        Byte offset in the file, None where there is no such place.
    """

    severity: rules.Severity
    code: str
    where: str
    message: str
    offset: int | None

    def __str__(self) -> str:
        place = "" if self.offset is None else f" (byte {self.offset})"
        # The error family knows how to print what a hostile file wrote.
        return f"{self.severity}: {InputError(self.where, self.message + place)}"


@dataclass(slots=True)
class ParsedHeader:
    """What `parse_header` found; attributes as in `GgufFile`."""

    version: int = 0
    alignment: int = rules.DEFAULT_ALIGNMENT
    kvs: dict[str, KV] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    data_offset: int = 0
    template: bool = False
    findings: list[Finding] = field(default_factory=list)


class _Placed(NamedTuple):
    """A row of the tensor table: `n_bytes` is None where type or shape are unusable, `at` where its offset stands."""

    name: str
    offset: int
    n_bytes: int | None
    at: int


def parse_header(fd: int, n_file_bytes: int, path: Path, *, template: bool) -> ParsedHeader:
    """Read and judge the header of an open file of `n_file_bytes`; ResourceError if reading fails.

    Parsing stops where going on would only misread (a length beyond the file, an unknown value type), and the last
    finding says so.
    """
    return _Parser(fd, n_file_bytes, path, template=template).run()


class _Parser:
    def __init__(self, fd: int, n_file_bytes: int, path: Path, *, template: bool) -> None:
        self.fd, self.size, self.path = fd, n_file_bytes, path
        self.may_be_template = template
        self.window = HeaderWindow(fd, n_file_bytes, path)
        self.header = ParsedHeader()
        self.aligned = True        # the alignment is known
        self.where = "header"
        self.placed: list[_Placed] = []
        self.n_dropped = self.n_dropped_errors = 0

    def run(self) -> ParsedHeader:
        try:
            n_tensors, n_kvs = self.read_counts()
            for index in range(n_kvs):
                self.read_kv(index)
            for index in range(n_tensors):
                self.read_tensor(index)
        except Unreadable as stop:
            self.take_faults()
            self.report(Fault("error", stop.code, f"{stop.message}; nothing behind this byte was read"), stop.offset)
        else:
            if self.aligned:
                self.check_data()
        if self.n_dropped:
            severity: rules.Severity = "error" if self.n_dropped_errors else "warning"
            message = f"{self.n_dropped} more findings, {self.n_dropped_errors} of them errors, are not listed"
            self.header.findings.append(Finding(severity, "more-findings", "file", message, None))
        return self.header

    def report(self, fault: Fault, offset: int | None) -> None:
        if len(self.header.findings) < _MAX_FINDINGS:
            self.header.findings.append(Finding(fault.severity, fault.code, self.where, fault.message, offset))
        else:
            self.n_dropped += 1
            self.n_dropped_errors += fault.severity == "error"

    def error(self, code: str, message: str, offset: int | None) -> None:
        self.report(Fault("error", code, message), offset)

    def report_all(self, faults: Iterable[Fault], offset: int) -> bool:
        """Report `faults`; whether none is an error."""
        fine = True
        for fault in faults:
            self.report(fault, offset)
            fine = fine and fault.severity != "error"
        return fine

    def take_faults(self) -> None:
        for fault, offset in self.window.faults:
            self.report(fault, offset)
        self.window.faults.clear()

    def read_counts(self) -> tuple[int, int]:
        window, header = self.window, self.header
        if not self.size:
            raise Unreadable("truncated", "the file is empty, expected GGUF", 0)
        magic = window.take(min(4, self.size), "the magic")
        if magic != rules.MAGIC:
            raise Unreadable("magic", f"magic is {magic!r}, expected {rules.MAGIC!r}", 0)
        header.version = version = window.take_u32("the version")
        if version not in rules.READABLE_VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = f"version is {version}, expected {' or '.join(map(str, rules.READABLE_VERSIONS))}"
            if version & 0xFFFF == 0 and swapped:
                what = f"big-endian file (version {swapped} byte-swapped) is not supported, expected little-endian"
                raise Unreadable("big-endian", what, 4)
            raise Unreadable("version", what, 4)
        n_tensors = window.take_u64("the number of tensors")
        n_kvs = window.take_u64("the number of metadata entries")
        for count, smallest, code, what, at in (
            (n_tensors, _MIN_TENSOR_BYTES, "tensor-count", "tensors", 8),
            (n_kvs, _MIN_KV_BYTES, "kv-count", "metadata entries", 16),
        ):
            if count * smallest > window.n_remaining:
                message = f"{count} {what} take at least {count * smallest} bytes, the file has {window.n_remaining}"
                raise Unreadable(code, message + " more", at)
        return n_tensors, n_kvs

    def read_kv(self, index: int) -> None:
        window, kvs = self.window, self.header.kvs
        self.where = f"metadata entry {index}"
        at = window.pos
        key, raw = window.take_text("the key")
        self.where = key or self.where
        self.report_all(rules.check_key(raw), at)
        value_type = window.take_type("the value")
        value_at = window.pos
        value, item_type = window.take_value(value_type)
        if window.faults:
            self.take_faults()
        if key in kvs:
            self.error("key-duplicate", "metadata key appears twice, expected once", at)
            return
        kvs[key] = KV(key, value_type.name, value, item_type)
        if key == rules.ALIGNMENT_KEY:
            if self.report_all(rules.check_alignment(value_type.name, value), value_at):
                self.header.alignment = value
            else:
                self.aligned = False

    def read_tensor(self, index: int) -> None:
        window = self.window
        self.where = f"tensor {index}"
        at = window.pos
        name, raw = window.take_text("the name")
        self.where = name or self.where
        self.report_all(rules.check_name(raw), at)
        shape_at = window.pos
        n_dims = window.take_u32("the number of dimensions")
        ne = tuple(np.frombuffer(window.take(8 * n_dims, f"a shape of {n_dims} dimensions"), "<u8").tolist())
        type_at = window.pos
        type_id = window.take_u32("the type")
        tensor_format = BY_ID.get(type_id)
        offset_at = window.pos
        offset = window.take_u64("the offset")
        if window.faults:
            self.take_faults()
        usable = self.report_all(rules.check_shape(ne, tensor_format), shape_at)
        if tensor_format is None:
            why = "which was removed from ggml" if type_id in REMOVED_IDS else f"known are 0 to {max(BY_ID)}"
            self.error("tensor-type", f"ggml type is {type_id}, {why}", type_at)
        tensor = TensorInfo(name, ne, tensor_format, offset) if tensor_format is not None and usable else None
        self.placed.append(_Placed(name, offset, tensor.n_bytes if tensor else None, offset_at))
        if name in self.header.tensors:
            self.error("name-duplicate", "tensor name appears twice, expected once", at)
        elif tensor is not None:
            self.header.tensors[name] = tensor

    def check_data(self) -> None:
        """Where the tensors lie, whether the file holds them, and nothing else."""
        header, size, placed = self.header, self.size, self.placed
        table_end = self.window.pos
        header.data_offset = start = pad(table_end, header.alignment)
        if self.may_be_template and size <= start and any(p.n_bytes for p in placed):
            header.template = True
            if len(placed) > 1 and not any(p.offset for p in placed):
                self.where = "tensor table"
                message = f"all {len(placed)} offsets are 0; only a template may leave the layout open"
                self.report(Fault("warning", "template-offsets", message), placed[0].at)
            else:
                self.check_offsets()
            return
        self.check_offsets()
        # The last byte of each tensor decides, not the sum: offsets may be wrong and are reported as such.
        ends = [start + p.offset + p.n_bytes for p in placed if p.n_bytes is not None]
        end = max((pad(e - start, header.alignment) + start for e in ends), default=table_end)
        if size <= start < end:
            self.where = "data section"
            message = f"is missing: the file ends at byte {size}, expected {end}; it looks like a template"
            self.error("no-data", message, size)
            return
        n_before = len(header.findings)
        for p in placed:
            if p.n_bytes is not None and start + p.offset + p.n_bytes > size:
                self.where = p.name
                message = f"data ends at byte {start + p.offset + p.n_bytes}, the file has {size} bytes"
                self.error("tensor-extent", message, p.at)
        if len(header.findings) > n_before or len(ends) < len(placed):
            return
        self.where = "end of file"
        if size < end:
            self.error("missing-padding", f"the file ends at byte {size}, expected {end}: padding is missing", size)
        elif size > (end if placed else start):
            self.error("trailing-data", f"{size - end} bytes follow the data, expected none", end)
        if all(finding.severity != "error" for finding in header.findings):
            self.check_padding(table_end)

    def check_offsets(self) -> None:
        """Each tensor must begin where the padded sum of those before it ends: no hole, overlap or disorder."""
        alignment = self.header.alignment
        # Two ways to go on after a wrong offset, so that one mistake is one finding: where the tensor would have
        # ended had it begun where it should, and where it ends as it stands. None: its size is not known.
        should: int | None = 0
        stands: int | None = 0
        for p in self.placed:
            if should is None or stands is None:
                should = p.offset
            self.where = p.name
            begin = p.offset if p.offset == stands else should
            if p.offset != begin or p.offset % alignment:
                self.error("tensor-offset", f"offset is {p.offset}, {_misplacement(p.offset, begin, alignment)}", p.at)
            if p.n_bytes is None:
                should = stands = None
                continue
            should = pad(begin + p.n_bytes, alignment)
            stands = pad(p.offset + p.n_bytes, alignment)
            if self.header.data_offset + stands > rules.MAX_INT64:
                self.error("data-too-big", f"data ends beyond byte {rules.MAX_INT64}", p.at)

    def check_padding(self, table_end: int) -> None:
        """Padding is zero by the specification; loaders do not look. Looks at the first thousand gaps only."""
        start, alignment = self.header.data_offset, self.header.alignment
        gaps = [(table_end, min(start, self.size), "header")]
        ends = [(start + p.offset + p.n_bytes, p.name) for p in self.placed if p.n_bytes is not None]
        gaps += [(end, pad(end - start, alignment) + start, name) for end, name in ends]
        gaps = [gap for gap in gaps if gap[0] < gap[1]]
        budget = rules.MAX_ALIGNMENT * 16
        for first, last, where in gaps[:_MAX_PADDING_READS]:
            budget -= last - first
            if budget < 0:
                return
            padding = np.empty(last - first, np.uint8)
            read_into(self.fd, padding.data, first, self.path)
            odd = np.flatnonzero(padding)
            if odd.size:
                self.where = where
                at = first + int(odd[0])
                message = f"{odd.size} of {len(padding)} padding bytes behind it are not zero"
                self.report(Fault("warning", "padding", message), at)


def _misplacement(offset: int, expected: int, alignment: int) -> str:
    if offset % alignment:
        return f"expected {expected}; it is no multiple of the alignment {alignment}"
    if offset > expected:
        return f"expected {expected}; a hole of {offset - expected} bytes"
    return f"expected {expected}; it overlaps what comes before"
