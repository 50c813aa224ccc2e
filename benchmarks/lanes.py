"""Decode attention on some SMs and a layer's GEMMs on the rest of one GPU: each alone, and side by side.

Half of a batch attends while the other half is in its GEMMs, which are those of cuBLAS and those of this package.
Beside each other both run for longer than is measured. The bandwidth is that of the KV, which must be read once.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn import functional

from lib.arguments import SHAPES, add_shape, new_parser, sm_split
from lib.report import report
from lib.side_by_side import Work, measure_us
from lib.tensors import decode_problem, random_normal
from nanovllm.engine.green_manager import GreenManager
from nanovllm.kernels import cuda_gemm
from nanovllm.kernels.triton_attention import Backend
from nanovllm.utils.device import Device

NUM_COPIES = 4
"""Copies of all data, used in turn: more than the caches hold."""


def attention(batch: int, context: int, shape: str, num_sms: int) -> Work:
    backend, heads = Backend(), SHAPES[shape]["num_attention_heads"]
    problems = []
    for _ in range(NUM_COPIES):
        query, pool, metadata = decode_problem([context] * batch, heads, 8, 64)
        metadata = replace(metadata, num_sms=num_sms)
        problems.append((query, pool, replace(metadata, work_split=backend.split_work(metadata, heads, pool)), 0.09))
    return lambda turn: backend.attend(*problems[turn % NUM_COPIES])


def gemms(batch: int, shape: str, num_sms: int | None) -> Work:
    """QKV, output, gate and up, down of one layer; by cuBLAS if `num_sms` is None."""
    size, ffn, heads = (SHAPES[shape][name] for name in ("hidden_size", "intermediate_size", "num_attention_heads"))
    sizes = ((heads + 16) * 128, size), (size, heads * 128), (2 * ffn, size), (size, ffn)
    layers = [[random_normal(*matrix) * matrix[1] ** -0.5 for matrix in sizes] for _ in range(NUM_COPIES)]
    tokens = [random_normal(batch, inputs) for _, inputs in sizes]

    def run(turn: int) -> None:
        for x, weight in zip(tokens, layers[turn % NUM_COPIES], strict=True):
            if num_sms is None:
                functional.linear(x, weight)
            else:
                cuda_gemm.shared_linear(x, weight, num_sms)

    return run


def main() -> None:
    parser = new_parser(__doc__)
    add_shape(parser, "qwen3-8b")  # whose layer
    parser.add_argument("--batch", type=int, default=512, help="requests in each half")
    parser.add_argument("--context", type=int, default=512)
    splits = [(28, 104), (32, 100), (40, 92), (48, 84), (64, 68)]
    parser.add_argument("--splits", type=sm_split, nargs="+", default=splits)
    args = parser.parse_args()
    if "num_experts" in SHAPES[args.model_shape]:
        parser.error(f"--model-shape {args.model_shape} has experts, whose GEMMs have one kernel on any SMs")
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    torch.manual_seed(0)
    kv_bytes = args.batch * args.context * 2 * 8 * 128 * 2
    rows = []
    print(f"{'':12}{'attention alone':>22}{'GEMMs alone':>16}{'side by side':>34}")
    print(f"{'split':12}{'us':>13}{'TB/s':>9}{'cuBLAS':>9}{'own':>7}{'cuBLAS, attention':>20}{'own, attention':>18}")
    for split in args.splits:
        manager = GreenManager(Device("cuda", 0), *split)
        lanes = [stream for stream in manager.allocate().streams.values() if stream is not None]
        attend = attention(args.batch, args.context, args.model_shape, split[0])
        (attention_us,) = measure_us((lanes[0], attend))
        row: dict[str, object] = {"split": split, "attention_us": attention_us}
        columns = [f"{attention_us:13.0f}{kv_bytes / attention_us / 1e6:9.2f}"]
        beside = []
        for name, num_sms in (("cublas", None), ("own", split[1])):
            work = gemms(args.batch, args.model_shape, num_sms)
            (alone_us,) = measure_us((lanes[1], work))
            both = measure_us((lanes[0], attend), (lanes[1], work), alone_us=(attention_us, alone_us))
            row[name] = {"alone_us": alone_us, "beside_us": both[1], "attention_beside_us": both[0]}
            columns.append(f"{alone_us:{9 if num_sms is None else 7}.0f}")
            beside.append(f"{both[1]:{14 if num_sms is None else 12}.0f}{both[0]:6.0f}")
        rows.append(row)
        print(f"{split[0]}:{split[1]:<9}", *columns, *beside, flush=True)
        torch.cuda.synchronize()
        manager.close()
    result = {"model_shape": args.model_shape, "batch": args.batch, "context": args.context, "rows": rows}
    report("lanes", result, args.output)


if __name__ == "__main__":
    main()
