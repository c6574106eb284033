"""`diff`: in what two GGUF files differ, and by how much their values do."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dsv4tools.errors import UsageError
from dsv4tools.formats import measure
from dsv4tools.formats.codecs import DECODABLE, decode_rows, prepare
from dsv4tools.formats.measure import ErrorSums, measure_errors
from dsv4tools.gguf.splits import SPLIT_KEYS, open_whole
from dsv4tools.workers import choose_threads, run_in_order

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from dsv4tools.gguf.header import TensorInfo
    from dsv4tools.gguf.reader import GgufFile
    from dsv4tools.gguf.values import KV

Kind = Literal["missing", "type", "shape", "value", "bytes"]

_PIECE_VALUES = 1 << 20    # a whole number of blocks of every type
_CHUNK_VALUES = 1 << 16
_MAX_SHOWN = 60


@dataclass(frozen=True, slots=True)
class EntryDifference:
    """A metadata entry that differs: missing, of another type, or of another value. `a` and `b` are shortened."""

    key: str
    kind: Kind
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A tensor that differs: missing, of another shape or type, or in its bytes.

    Attributes
    ----------
    name, kind:
        Which and how. A tensor of another type is compared by value all the same.
    a, b:
        Type and shape in each file; empty where it is missing.
    n_values, n_bytes_different:
        Its size, and how many of its bytes differ; 0 where types or shapes do.
    errors:
        Of B's values against A's; None where they cannot be decoded or compared.
    """

    name: str
    kind: Kind
    a: str
    b: str
    n_values: int = 0
    n_bytes_different: int = 0
    errors: ErrorSums | None = None


@dataclass
class Difference:
    """The result of `diff`.

    Attributes
    ----------
    a, b:
        The files.
    entries, tensors:
        What differs; tensors with values that differ most come first.
    n_entries_same, n_tensors_same:
        What does not.
    notes:
        Differences that change nothing for a loader, one sentence each: order, alignment, version.
    """

    a: Path
    b: Path
    entries: list[EntryDifference] = field(default_factory=list)
    tensors: list[TensorDifference] = field(default_factory=list)
    n_entries_same: int = 0
    n_tensors_same: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether both say the same and hold the same bytes."""
        return not self.entries and not self.tensors


def diff(
    a: str | Path, b: str | Path, *, tensors: Sequence[str] = (), threads: int | None = None,
    progress: Callable[[int], None] | None = None, announce: Callable[[int], None] | None = None,
) -> Difference:
    """Compare two GGUF files, or split sets named by any of their parts.

    Parameters
    ----------
    tensors:
        Globs: compare only these tensors, and no metadata.
    threads:
        How many pieces are compared at once; all usable cores by default.
    progress, announce:
        `announce` is called once with the number of bytes of A to compare, `progress` with those done since the last
        call.

    Raises
    ------
    UsageError
        A glob that matches nothing in either file, or `threads` out of range.
    InputError, ResourceError
        A file is no good GGUF, or cannot be read.
    """
    n_threads = choose_threads(threads)
    with open_whole(a) as file_a, open_whole(b) as file_b:
        result = Difference(Path(a), Path(b))
        names = _select(file_a, file_b, tensors)
        if not tensors:
            _compare_entries(file_a, file_b, result)
            result.notes = list(_compare_layout(file_a, file_b))
        shared = list(_compare_infos(file_a, file_b, names, result))
        if announce is not None:
            announce(sum(file_a.tensors[name].n_bytes for name in shared))
        found = _compare_data(file_a, file_b, shared, n_threads, progress)
        for name in shared:
            difference = _conclude(file_a.tensors[name], file_b.tensors[name], found[name])
            if difference is None:
                result.n_tensors_same += 1
            else:
                result.tensors.append(difference)
    result.tensors.sort(key=_badness)
    return result


def _badness(t: TensorDifference) -> tuple[bool, float]:
    return t.errors is not None, -t.errors.relative_rmse if t.errors is not None else 0.0


def _select(a: GgufFile, b: GgufFile, globs: Sequence[str]) -> list[str]:
    names = list(dict.fromkeys([*a.tensors, *b.tensors]))
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise UsageError("--tensor", f"{glob!r} matches no tensor of {a.path} or {b.path}")
    return [name for name in names if not globs or any(fnmatchcase(name, glob) for glob in globs)]


# ---------------------------------------------------------------------------------------------------------- headers


def _compare_entries(a: GgufFile, b: GgufFile, result: Difference) -> None:
    for key in dict.fromkeys([*a.kvs, *b.kvs]):
        if key in SPLIT_KEYS:   # how a model is cut into files says nothing of the model
            continue
        in_a, in_b = a.kvs.get(key), b.kvs.get(key)
        if in_a == in_b:
            result.n_entries_same += 1
            continue
        kind: Kind = "value"
        if in_a is None or in_b is None:
            kind = "missing"
        elif (in_a.type, in_a.item_type) != (in_b.type, in_b.item_type):
            kind = "type"
        result.entries.append(EntryDifference(key, kind, *_show_entries(in_a, in_b)))


def _show_entries(a: KV | None, b: KV | None) -> tuple[str, str]:
    """Both values, from where they begin to differ if they are long."""
    shown = []
    first = 0
    if a is not None and b is not None and a.type == b.type == "arr":
        pairs = zip(_listed(a.value), _listed(b.value), strict=False)
        end = min(len(a.value), len(b.value)) if len(a.value) != len(b.value) else 0
        first = next((i for i, (x, y) in enumerate(pairs) if x != y), end)
    for kv in (a, b):
        if kv is None:
            shown.append("")
        elif kv.type == "arr":
            text = _cut(", ".join(map(repr, _listed(kv.value[first : first + 4]))))
            shown.append(f"{len(kv.value)} {kv.item_type}, from item {first}: {text}" if first else
                         f"{len(kv.value)} {kv.item_type}: {text}")
        else:
            shown.append(f"{kv.type} {_cut(repr(kv.value))}")
    return shown[0], shown[1]


def _listed(value: Any) -> list[Any]:  # noqa: ANN401  - an array entry's list or numpy array
    return value.tolist() if isinstance(value, np.ndarray) else list(value)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def _compare_layout(a: GgufFile, b: GgufFile) -> Iterator[str]:
    for what, of_a, of_b in (("version", a.version, b.version), ("alignment", a.alignment, b.alignment)):
        if of_a != of_b:
            yield f"{what} is {of_a} and {of_b}"
    for what, order_a, order_b in (("metadata entries", a.kvs, b.kvs), ("tensors", a.tensors, b.tensors)):
        if [k for k in order_a if k in order_b] != [k for k in order_b if k in order_a]:
            yield f"{what} stand in another order"


def _compare_infos(a: GgufFile, b: GgufFile, names: Sequence[str], result: Difference) -> Iterator[str]:
    """The names whose data can be compared; what cannot is a difference."""
    for name in names:
        in_a, in_b = a.tensors.get(name), b.tensors.get(name)
        if in_a is None or in_b is None:
            result.tensors.append(TensorDifference(name, "missing", _describe(in_a), _describe(in_b)))
        elif in_a.ne != in_b.ne:
            result.tensors.append(TensorDifference(name, "shape", _describe(in_a), _describe(in_b)))
        else:
            yield name


def _describe(info: TensorInfo | None) -> str:
    return "" if info is None else f"{info.format.name} {list(info.ne)}"


# ------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of values of one tensor in both files."""

    a: TensorInfo
    b: TensorInfo
    first: int
    n: int


def _compare_data(
    a: GgufFile, b: GgufFile, names: Sequence[str], threads: int, progress: Callable[[int], None] | None
) -> dict[str, tuple[int, ErrorSums]]:
    """For each name: bytes that differ, and the errors of the values (measured only where bytes differ)."""
    prepare({f.tensors[name].format.name for f in (a, b) for name in names} & DECODABLE)
    measure.prepare()

    def make_worker(computing: threading.Semaphore) -> Callable[[_Piece], tuple[int, ErrorSums]]:
        def work(piece: _Piece) -> tuple[int, ErrorSums]:
            data_a, data_b = _read(a, piece.a, piece), _read(b, piece.b, piece)
            with computing:
                return _compare_piece(piece, data_a, data_b)

        return work

    pieces = (_Piece(a.tensors[name], b.tensors[name], first, min(_PIECE_VALUES, n - first))
              for name in names for n in [prod(a.tensors[name].ne)] for first in range(0, n, _PIECE_VALUES))
    n_different, errors = dict.fromkeys(names, 0), {name: ErrorSums() for name in names}
    with closing(run_in_order(pieces, make_worker, threads)) as results:
        for piece, (n, of_piece) in results:
            n_different[piece.a.name] += n
            errors[piece.a.name].add(of_piece)
            if progress is not None:
                progress(_n_bytes(piece.a, piece.n))
    return {name: (n_different[name], errors[name]) for name in names}


def _n_bytes(info: TensorInfo, n_values: int) -> int:
    return n_values // info.format.block_values * info.format.block_bytes


def _read(file: GgufFile, info: TensorInfo, piece: _Piece) -> NDArray[np.uint8]:
    return file.read_tensor_bytes(info.name, _n_bytes(info, piece.first), _n_bytes(info, piece.n))


def _compare_piece(piece: _Piece, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> tuple[int, ErrorSums]:
    same_type = piece.a.format == piece.b.format
    if same_type and np.array_equal(a, b):
        return 0, ErrorSums()
    n_different = int(np.count_nonzero(a != b)) if same_type else 0
    errors = ErrorSums()
    if {piece.a.format.name, piece.b.format.name} <= DECODABLE:
        values_a, values_b = np.zeros((2, min(_CHUNK_VALUES, piece.n)), np.float32)
        for first in range(0, piece.n, _CHUNK_VALUES):
            n = min(_CHUNK_VALUES, piece.n - first)
            for info, data, values in ((piece.a, a, values_a), (piece.b, b, values_b)):
                part = data[_n_bytes(info, first) : _n_bytes(info, first + n)]
                decode_rows(part, info.format, 1, n, values[None, :n])
            measured = measure_errors(values_b[:n], values_a[:n])
            if measured.largest_at >= 0:
                measured.largest_at += piece.first + first
            errors.add(measured)
    return n_different, errors


def _conclude(a: TensorInfo, b: TensorInfo, found: tuple[int, ErrorSums]) -> TensorDifference | None:
    n_different, errors = found
    measured = errors if errors.n or errors.n_not_finite else None
    if a.format != b.format:
        return TensorDifference(a.name, "type", _describe(a), _describe(b), prod(a.ne), 0, measured)
    if n_different:
        return TensorDifference(a.name, "bytes", _describe(a), _describe(b), prod(a.ne), n_different, measured)
    return None
