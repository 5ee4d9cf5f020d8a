"""The table of tiles: it belongs to the sources, leaves every kernel something to run, and decides what a GPU tries; a tile changes no meaning."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from qkernels import _gpu, _tiles, int_pack
from qkernels.fp4_linear import triton as fp4_gpu
from qkernels.grouped_linear import triton as grouped_gpu
from qkernels.int_linear import triton as int_gpu
from qkernels.kv_attention import triton as attention_gpu
from qkernels.weight_linear import triton as weight_gpu
from triton.runtime.autotuner import Autotuner

BENCH = Path(__file__).parents[2] / "tools/bench"
COMMAND = "python tools/bench/triton_report.py --tiles"
TARGETS = ("sm_80", "sm_90", "gfx942")


def table():
    return json.loads(_tiles.TABLE.read_text())


def test_the_table_belongs_to_the_sources():
    for name, digest in table()["sources"].items():
        found = hashlib.sha256((_tiles.TABLE.parent / name).read_bytes()).hexdigest()
        assert found == digest, f"{name} has changed since its tiles were judged: {COMMAND}"


def test_the_table_judges_every_candidate_once():
    kernels = table()["kernels"]
    assert set(kernels) == set(_tiles.CANDIDATES), COMMAND
    assert {name.split()[0] for name in kernels} == {Path(source).parent.name for source in table()["sources"]}
    for name, of in kernels.items():
        assert set(of) == set(TARGETS)
        for judged in of.values():
            assert sorted([*judged["kept"], *judged["struck"]]) == sorted(map(str, _tiles.CANDIDATES[name])), f"{name}: {COMMAND}"
            assert all(judged["struck"].values()), "a tile is struck out with a reason"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", _tiles.CANDIDATES)
def test_the_default_is_kept_for_every_target(name, target):
    kept = _tiles.kept(name, target)
    assert str(_tiles.default(name)) in map(str, kept)


def test_a_gpu_without_a_table_has_no_candidates():
    assert _tiles.kept("kv_attention", "sm_120") == ()


def compile_without_a_device(code):
    """A process of its own: kernels decorated for the interpreter cannot be compiled."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(BENCH), *(p for p in sys.path if p)])
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(300)
def test_a_tile_that_spills_is_struck_out():
    kernels = compile_without_a_device(
        "import json, triton_report as report\n"
        "from qkernels._tiles import Tile, default\n"
        "huge = Tile({'BT': 128, 'BN': 128, 'BK': 64}, 1, 2)\n"
        "print(json.dumps(report.judge({'int_linear many': [huge, default('int_linear many')]}, ['sm_80'])[1]))\n"
    )
    judged = kernels["int_linear many"]["sm_80"]
    assert judged["kept"] == [str(_tiles.default("int_linear many"))]
    assert all("spills" in why for why in judged["struck"]["BT=128 BN=128 BK=64 warps=1 stages=2"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_candidate_is_judged_as_the_table_says():
    kernels = compile_without_a_device(
        "import json, triton_report as report\n"
        "print(json.dumps(report.judge({name: list(tiles) for name, tiles in report.CANDIDATES.items()}, list(report.TARGETS))[1]))\n"
    )
    have, want = ({(k, t): judged["kept"] for k, of in found.items() for t, judged in of.items()} for found in (kernels, table()["kernels"]))
    assert have == want


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def calls():
    """Of each kernel: a call on a small shape that no tile divides."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=g).to(DEVICE, dtype)

    def codes(*shape, dtype=torch.uint8, low=0, high=256):
        return torch.randint(low, high, shape, generator=g).to(DEVICE, dtype)

    n, k, group = 70, 256, 128
    words = int_pack.pack(codes(n, k, dtype=torch.int32, high=16), 4, torch.int32)
    stack = int_pack.pack(codes(2, n, k, dtype=torch.int32, high=16), 4, torch.int32)
    scale = rand(n, k // group).abs() * 0.02 + 1e-3
    scales = rand(2, n, k // group).abs() * 0.02 + 1e-3
    packed, mx = codes(n, k // 2), codes(n, k // 32, low=120, high=130)
    cache = (codes(1, 2, 70, 32), rand(1, 2, 70).abs() / 128, codes(1, 2, 70, 32), rand(1, 2, 70).abs() / 128)
    lengths = torch.tensor([70], dtype=torch.int32, device=DEVICE)
    q = rand(1, 4, 32, dtype=torch.float16)
    found = {"kv_attention": lambda: attention_gpu.kv_attention(q, *cache, lengths, bits=8)}
    for rows, name in ((3, "few"), (37, "many")):
        x, ints, x_scale = rand(rows, k, dtype=torch.float16), codes(rows, k, dtype=torch.int8, low=-128, high=128), rand(rows, 1).abs()
        # rows of two experts
        tall, ends = rand(2 * rows, k, dtype=torch.float16), torch.tensor([rows - 1, 2 * rows], dtype=torch.int32, device=DEVICE)
        found |= {
            f"weight_linear {name}": lambda x=x: weight_gpu.weight_linear(x, words, scale, bits=4),
            f"int_linear {name}": lambda q=ints, s=x_scale: int_gpu.int_linear(q, s, words, scale, bits=4, dtype=torch.float32),
            f"fp4_linear {name}": lambda x=x: fp4_gpu.fp4_linear(x, packed, mx),
            f"grouped_linear {name}": lambda x=tall, ends=ends: grouped_gpu.grouped_linear(x, ends, stack, scales, bits=4),
        }
    return found


@pytest.mark.parametrize("name", _tiles.CANDIDATES)
def test_a_tile_changes_only_the_order_of_sums(name, monkeypatch):
    call = calls()[name]
    want = call()
    # float32 sums in another order, rounded once to the result's dtype; attention also rounds its weights to float16 relative to the maximum so far
    steps = {torch.float32: 1e-5, torch.float16: 2.0**-10}[want.dtype]
    for tile in _tiles.CANDIDATES[name][1:]:
        monkeypatch.setitem(_tiles.CANDIDATES, name, (tile,))
        torch.testing.assert_close(call(), want, rtol=steps, atol=steps * float(want.abs().max()))


@pytest.mark.skipif(DEVICE == "cuda", reason="stands in for a GPU")
def test_kept_tiles_alone_are_timed_once_for_each_shape_and_bucket_of_rows(monkeypatch):
    tried = []

    def timed(call, quantiles):
        call()
        tried.append(call)
        # the second one is the fastest
        return [1.0 if len(tried) == 2 else 2.0] * 3

    monkeypatch.setattr(_gpu, "_target", lambda: "sm_80")
    monkeypatch.setattr(Autotuner, "do_bench", property(lambda self: timed))
    _gpu._tuner.cache_clear()
    name = "weight_linear few"
    kept = _tiles.kept(name, "sm_80")
    assert len(kept) > 1
    call = calls()[name]
    tuned = call()
    assert len(tried) == len(kept)
    assert torch.equal(call(), tuned) and len(tried) == len(kept), "found once"
    tuner = _gpu._tuner(weight_gpu.weight_linear_kernel, name, "sm_80", 128, ("N", "K", "GROUP", "BITS", "SHIFT"), 16)
    assert [str(_tiles.Tile(c.kwargs, c.num_warps, c.num_stages)) for c in tuner.configs] == [str(tile) for tile in kept]
    assert tuner.best_config == tuner.configs[1]
    monkeypatch.setattr(_gpu, "_target", lambda: None)
    torch.testing.assert_close(tuned, call(), rtol=2.0**-10, atol=2.0**-10 * float(tuned.abs().max()))


def test_a_tile_never_crosses_a_group():
    tile = _tiles.Tile({"BT": 16, "BN": 32, "BK": 128}, 4, 3)
    assert tile.within(32).blocks == {"BT": 16, "BN": 32, "BK": 32} and tile.within(128) is tile and tile.within(None) is tile


@pytest.mark.parametrize("rows", [16, 17])
def test_tiles_of_experts_have_one_height(rows):
    # they are counted before the launch
    assert len({tile.blocks["BT"] for tile in _tiles.CANDIDATES[_tiles.of_rows("grouped_linear", rows)]}) == 1


def test_rows_fall_into_buckets():
    assert [_gpu._bucket(rows) for rows in (1, 16, 17, 1024, 5000, 10**6)] == [16, 16, 64, 1024, 16384, 16384]
    assert _tiles.of_rows("int_linear", 16) == "int_linear few" and _tiles.of_rows("int_linear", 17) == "int_linear many"
