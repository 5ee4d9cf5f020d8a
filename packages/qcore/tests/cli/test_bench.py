from types import SimpleNamespace

import torch
from qcore.cli.bench import ROWS, speed_card
from qcore.modules import QuantizedLinear
from qcore.numbers import int_weight, quantize
from qcore.ops import KERNELS
from qcore.packing import Bits
from torch import nn


def test_the_card_has_each_kind_of_layer_once_and_every_kernel_that_runs_it():
    own = SimpleNamespace(kernels={k.name: k for k in KERNELS})

    def leaf(n: int, k: int) -> QuantizedLinear:
        q = quantize(torch.randn(n, k), int_weight(4, 32))
        return QuantizedLinear(Bits().pack(q), q.spec, q.shape, Bits()).bind([k() for k in KERNELS])

    model = nn.Sequential(leaf(256, 128), leaf(128, 256), leaf(256, 128))
    threads = torch.get_num_threads()
    card = speed_card(model, own, threads=1, seconds=0.001)
    assert torch.get_num_threads() == threads
    assert {row["layer"] for row in card["rows"]} == {"0", "1"}
    for layer in ("0", "1"):
        for rows in ROWS:
            here = [r for r in card["rows"] if r["layer"] == layer and r["rows"] == rows]
            assert {"float", "reference-linear"} <= {r["kernel"] for r in here}
            assert [r["kernel"] for r in here if r["chosen"]] == [model[0].explain().kernel.name]
            assert all(r["ms"] > 0 and r["gb_s"] > 0 for r in here)
    assert card["read_gb_s"] > 0 and card["machine"]["torch"] == torch.__version__
