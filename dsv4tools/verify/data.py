"""A report as plain data, ready for JSON: what is infinite or NaN there is None."""

from __future__ import annotations

from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4tools.formats.measure import ErrorSums
    from dsv4tools.verify.report import DepthCheck, Report, TensorCheck


def report_data(report: Report) -> dict[str, Any]:
    """Everything that a report says."""
    manifest = report.manifest
    return {
        "path": str(report.path), "ok": report.ok, "template": report.template, "n_tensors": report.n_tensors,
        "n_bytes": report.n_file_bytes,
        "findings": [asdict(f) for f in report.findings],
        "sample_per_cent": report.sample,
        "tensors": [_tensor(t) for t in report.tensors],
        "depth": [_depth(d) for d in report.depth],
        "manifest": None if manifest is None else {
            "path": str(manifest.path), "algorithms": list(manifest.algorithms), "n_right": manifest.n_right,
            "n_hashes": manifest.n_hashes,
        },
        "behaviour": None if report.behaviour is None else
        {"ok": report.behaviour.ok} | {k: finite(v) for k, v in asdict(report.behaviour).items()},
        "engines": [v.as_data() | {"decides": v.engine in report.deciding} for v in report.engines],
    }


def finite(value: Any) -> Any:  # noqa: ANN401  - numbers and whatever else a field holds
    """`value`, or None for a number that JSON cannot say."""
    return None if isinstance(value, float) and not isfinite(value) else value


def _tensor(t: TensorCheck) -> dict[str, Any]:
    return {
        "name": t.name, "type": t.format, "n_bytes": t.n_bytes, "ok": t.ok, "judgement": t.judgement,
        "reason": t.reason, "faults": [asdict(f) for f in t.faults], "n_compared": t.n_compared,
        "n_different": t.n_different, "first_difference": t.difference, "n_blocks": t.n_blocks,
        "n_blocks_different": t.n_blocks_different, "n_values": t.n_values, "n_measured": t.n_measured,
        "bits_per_weight": t.bits_per_weight, "error": errors_data(t.error), "own_error": errors_data(t.own),
        "relative_rmse_by_matrix": [finite(v) for v in t.by_matrix],
    }


def errors_data(errors: ErrorSums | None) -> dict[str, Any] | None:
    """Relative RMSE, largest error and cosine."""
    if errors is None:
        return None
    return {
        "relative_rmse": finite(errors.relative_rmse), "largest": errors.largest_error,
        "largest_at": errors.largest_at, "cosine": finite(errors.cosine), "n_not_finite": errors.n_not_finite,
    }


def _depth(d: DepthCheck) -> dict[str, Any]:
    values = d.values
    return {
        "name": d.name, "type": d.format, "n_bytes": d.n_bytes, "n_blocks": d.scales.n_blocks,
        "n_zero_blocks": d.scales.n_zero, "n_subnormal_scales": d.scales.n_subnormal,
        "n_blocks_not_finite": d.scales.n_not_finite, "zero_matrices": list(d.zero_matrices),
        "values": None if values is None else {
            "n": values.n, "lowest": finite(values.lowest), "highest": finite(values.highest),
            "mean": finite(values.mean), "rms": finite(values.rms), "n_zero": values.n_zero,
            "n_not_finite": values.n_not_finite, "n_below_normal_f16": values.n_small - values.n_zero,
            "n_at_f16_limit": values.n_large,
        },
        "sampled_exponents": {i - 127: n for i, n in enumerate(d.exponents) if n},
    }
