"""ONNX Runtime's MatMulNBits with 4-bit weights, one node in a graph, inputs and outputs bound once."""

from collections.abc import Callable
from importlib.util import find_spec

import torch


def missing() -> str | None:
    """Why ONNX Runtime does not run here; None where it does."""
    absent = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    return f"{' and '.join(absent)} cannot be imported" if absent else None


def block_of(group: int, k: int) -> int:
    """The largest block that MatMulNBits knows (powers of two from 16 to 256) inside a group."""
    return next(b for b in (256, 128, 64, 32, 16) if group % b == 0 and k % b == 0)


def matmul(codes: torch.Tensor, scale: torch.Tensor, x: torch.Tensor, level: int, threads: int) -> Callable[[], torch.Tensor]:
    """A call that computes x Ŵᵀ.

    codes: [N, K] int8, -8 … 7
    scale: [N, K/G] float
    x:     [T, K] float32
    level: MatMulNBits' accuracy_level: 0 = as it sees fit, 4 = inputs rounded to int8
    return: the result [T, N] float32, which the next call overwrites
    """
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    (n, k), tokens = codes.shape, x.shape[0]
    block = block_of(k // scale.shape[1], k)
    raised = (codes + 8).to(torch.uint8).reshape(n, k // block, block // 2, 2)
    packed = raised[..., 0] | (raised[..., 1] << 4)
    scales = scale.float().repeat_interleave(k // scale.shape[1] // block, 1).flatten()
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=k, N=n, bits=4, block_size=block, accuracy_level=level
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [tokens, n])],
        [numpy_helper.from_array(packed.numpy(), "w"), numpy_helper.from_array(scales.numpy(), "s")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)], ir_version=8)
    onnx.checker.check_model(model, check_custom_domain=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = x.float().contiguous()
    y = torch.empty(tokens, n)
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, "float32", tuple(x.shape), x.data_ptr())
    binding.bind_output("y", "cpu", 0, "float32", tuple(y.shape), y.data_ptr())

    def call(kept: torch.Tensor = x) -> torch.Tensor:
        session.run_with_iobinding(binding)
        return y

    return call
