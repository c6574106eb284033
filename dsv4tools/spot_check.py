"""A look at a finished file: one row of every tensor, decoded, must be close to its source.

Encoding and decoding share no code, so this finds what no checksum does: a unit at the wrong place, a tensor under
another's name, an encoder that writes nonsense.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dsv4tools.checkpoint.matrix import RowReader
from dsv4tools.errors import Dsv4Error
from dsv4tools.formats.codecs import DECODABLE, decode_rows, decode_source
from dsv4tools.formats.scales import not_finite
from dsv4tools.plan import tensor_units

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dsv4tools.gguf.reader import GgufFile
    from dsv4tools.plan import Plan, Unit

# The largest error of a value, as a share of the largest magnitude in its row. For rounding formats a whole step, of
# which rounding takes half; Q4_K may give up outliers for the sake of the others, and has scales of six bits.
TOLERANCES = {"F32": 0.0, "F16": 2.0**-10, "BF16": 2.0**-7, "Q8_0": 2.0**-7, "Q4_K": 0.3}
OTHER_TOLERANCE = 1.0      # the formats of about two bits
_SMALLEST = 2.0**-24       # F16 has nothing below, and scales are F16


def check_samples(plan: Plan, file: GgufFile) -> None:
    """Compare the last row of every tensor of `file` with its source; Dsv4Error names the first that is far off.

    Raises ResourceError and VerifyError as reading the source does.
    """
    reader = RowReader()
    for planned in plan.tensors:
        unit: Unit | None = None
        for unit in tensor_units(planned):  # noqa: B007  - the last one is wanted
            pass
        is_copy = unit is not None and unit.matrix.blocks == planned.format
        if unit is None or not unit.n_rows or (not is_copy and planned.format.name not in DECODABLE | {"I32"}):
            continue
        row_bytes = unit.n_bytes // unit.n_rows
        found = file.read_tensor_bytes(planned.name, planned.n_bytes - row_bytes, row_bytes)
        if is_copy:
            right = _is_copied(found, unit, reader)
        else:
            right = _is_close(found, _read_row(plan, unit, reader), unit, _read_weights(unit))
        if not right:
            raise Dsv4Error(f"{file.path}: tensor {planned.name!r}",
                            f"was written wrongly: its last row is not that of {unit.matrix.weight.name!r}",
                            hint="please report this")


def _read_row(plan: Plan, unit: Unit, reader: RowReader) -> NDArray[np.int32] | NDArray[np.float32]:
    row = unit.first_row + unit.n_rows - 1
    if unit.matrix.kind is None:
        return reader.read_ids(unit.matrix, row, 1, plan.checkpoint.config.n_routed_experts)
    source = reader.read_rows(unit.matrix, row, 1)
    values = np.zeros((1, source.n_cols), np.float32)
    decode_source(source, values)
    values[~np.isfinite(values)] = 0   # they were zeroed: nothing else lets a conversion come so far
    return values


def _is_copied(found: NDArray[np.uint8], unit: Unit, reader: RowReader) -> bool:
    expected = reader.read_rows(unit.matrix, unit.first_row + unit.n_rows - 1, 1).data
    bad = not_finite(expected, unit.planned.format)   # these were zeroed
    expected.reshape(-1, unit.planned.format.block_bytes)[bad] = 0
    return bool(np.array_equal(found, expected))


def _read_weights(unit: Unit) -> NDArray[np.float32] | None:
    """The importance of its last row's columns."""
    importance = unit.planned.importance
    return None if importance is None else importance.read(len(importance.vectors) - 1)


def _is_close(
    found: NDArray[np.uint8], expected: NDArray[np.int32] | NDArray[np.float32], unit: Unit,
    weights: NDArray[np.float32] | None,
) -> bool:
    if unit.matrix.kind is None:
        return found.tobytes() == expected.astype("<i4").tobytes()
    decoded = np.zeros(expected.shape, np.float32)
    decode_rows(found, unit.planned.format, 1, expected.shape[1], decoded)
    if not np.isfinite(decoded).all():
        return False
    if weights is not None:
        # Columns without weight may be anything: what was weighed must at least be closer than zeros would be. Ours are
        # the encoders' own weights of errors (sigma of a row in place of a block's).
        importance = weights * np.sqrt(np.mean(expected.astype(np.float64) ** 2) + expected.astype(np.float64) ** 2)
        error, size = ((importance * values**2).sum() for values in (decoded.astype(np.float64) - expected, expected))
        return bool(error <= size)
    largest = float(np.abs(expected).max(initial=0))
    share = TOLERANCES.get(unit.planned.format.name, OTHER_TOLERANCE)
    allowed = share * largest + (_SMALLEST if share else 0)
    return bool((np.abs(decoded.astype(np.float64) - expected) <= allowed).all())
