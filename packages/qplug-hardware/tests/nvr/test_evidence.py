"""docs/evidence/nvr.json: what its page says of shapes is what the figures are."""

import json
from pathlib import Path

PARTS = json.loads((Path(__file__).parents[4] / "docs/evidence/nvr.json").read_text(encoding="utf-8"))["parts"]


def test_speedup_rises_then_falls_with_depth():
    for model in ("imp", "nvr", "nvr-nsb"):
        speedups = [r["speedup"] for r in PARTS["depths"][model].values()]
        best = speedups.index(max(speedups))
        assert 0 < best < len(speedups) - 1
        assert speedups == sorted(speedups[:best]) + sorted(speedups[best:], reverse=True)


def test_no_run_beats_the_bus_or_the_bound():
    runs = [PARTS["reference"]["models"], *(w["models"] for w in PARTS["workloads"].values())]
    for models in runs:
        for result in models.values():
            assert result["cycles"] >= max(result["bus_bound"], models["oracle"]["cycles"])
            assert result["offchip_bytes"] >= models["oracle"]["offchip_bytes"]


def test_units_whose_absence_the_page_calls_a_collapse():
    for name, found in PARTS["units"].items():
        whole = found["whole"]["coverage_with_late"]
        for unit in ("no SD", "no SCD", *(["no LBD"] if name in ("short-rows", "graph") else [])):
            assert found[unit]["coverage_with_late"] < 0.3 * whole, (name, unit)


def test_imp_covers_one_level_and_not_two():
    one, two = (PARTS["workloads"][n]["models"] for n in ("permutation", "two-level"))
    assert one["imp"]["speedup"] > 0.9 * one["nvr"]["speedup"] and two["imp"]["speedup"] < 0.6 * two["nvr"]["speedup"]
