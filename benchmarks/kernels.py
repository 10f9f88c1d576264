"""Matrix-vector products, one at a time, from weights that are out of the caches: ours against torch's.

    python benchmarks/kernels.py [--shape 1536x576] [--threads 1] [--kernels avx2] [--rounds 15] [-o FILE]

Every kernel goes through copies of one random matrix (200 MB of them), in turn with the others, for several rounds.
Printed are microseconds (the median round's mean), how far they are from reading the same bytes at the fastest speed at
which anything read memory in this run, and ratios of medians.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch

from secateur.models.formats import pack
from secateur.pipeline.machine import processor
from secateur.runtime import kernels
from secateur.runtime.kernels import KernelMatrix

ROTATED = 200_000_000


def matrix(shape, pattern):
    """Random weights with zeros: `pattern` is N:M or a sparsity."""
    W = torch.randn(shape)
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        return W.masked_fill((torch.rand(shape[0], shape[1] // m, m).argsort(2).argsort(2) >= n).view(shape), 0)
    return W.masked_fill(torch.rand(shape) < float(pattern), 0)


def candidates(shape):
    """Name -> weights removed, bytes, and a function that makes a callable over a copy of the matrix."""
    x = torch.randn(1, shape[1])

    def torch_linear(dtype):
        W = torch.randn(shape).to(dtype)
        xs = x.to(dtype)

        def make():
            copy = W.clone()
            return lambda: torch.nn.functional.linear(xs, copy)

        return W.numel() * W.element_size(), make

    def ours(format, tensors, packing, activations8):
        def make():
            held = KernelMatrix(format, shape, {s: t.clone() for s, t in tensors.items()}, packing)
            xs, y = x.bfloat16(), torch.empty(1, shape[0], dtype=torch.bfloat16)
            one = kernels.TYPES[torch.bfloat16]
            # The call alone: what Python adds to it is in `secateur bench`.
            call = partial(
                kernels.library().secateur_linear, held._pointer, xs.data_ptr(), one, 1, y.data_ptr(), one, None,
                activations8, torch.get_num_threads(),
            )  # fmt: skip
            call.keeps = held, xs, y
            return call

        return sum(t.numel() * t.element_size() for t in tensors.values()), make

    found = {
        "torch float32": torch_linear(torch.float32),
        "torch bfloat16": torch_linear(torch.bfloat16),
        "dense bfloat16": ours("dense", {"": torch.randn(shape).bfloat16().view(-1)}, None, False),
        "dense int8 W8A8": ours(
            "dense",
            {"": torch.randint(-127, 128, shape).to(torch.int8).view(-1), "_scale": torch.ones(shape[0])},
            None,
            True,
        ),
    }
    for pattern, format, values, activations8 in (
        ("0.5", "bitmask", None, False),
        ("0.6", "bitmask", None, False),
        ("0.7", "bitmask", None, False),
        ("0.8", "bitmask", None, False),
        ("0.5", "bitmask", "int8", False),
        ("2:4", "nm", None, False),
        ("8:16", "nm", None, False),
        ("2:4", "nm", "int8", False),
        ("2:4", "nm", "int8", True),
        ("8:16", "nm", "int8", True),
        ("4:16", "nm", "int8", True),
    ):
        packing, parts = pack("w", matrix(shape, pattern).bfloat16(), format, values)
        name = f"{format} {pattern} {values or 'bfloat16'}{' W8A8' if activations8 else ''}"
        found[name] = ours(format, parts, packing, activations8)
    return found


def bandwidth():
    """Bytes a second that one thread reads, the best of several."""
    block = torch.ones(ROTATED // 4)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        block.sum()
        seconds.append(time.perf_counter() - started)
    return ROTATED / min(seconds)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", action="append")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kernels", help="portable, avx2 or avx512")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("-o", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    used = kernels.use(options.kernels)
    speed = bandwidth()
    document = {
        "processor": processor(), "threads": options.threads, "kernels": used, "bytes_per_second": speed, "shapes": {},
    }  # fmt: skip
    print(f"{document['processor']}, {options.threads} threads, {used} kernels; reads {speed / 1e9:.1f} GB/s")
    for text in options.shape or ["1536x576", "4096x4096"]:
        shape = tuple(map(int, text.split("x")))
        made, times = {}, {}
        for name, (size, make) in candidates(shape).items():
            made[name] = (size, [make() for _ in range(max(3, min(ROTATED // size, 400)))])
            times[name] = []
        for _ in range(options.rounds + 1):
            for name, (_, calls) in made.items():
                started = time.perf_counter()
                for call in calls:
                    call()
                times[name].append((time.perf_counter() - started) / len(calls))
        rows = {}
        median = {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
        speed = max(speed, *(size / median[name] for name, (size, _) in made.items()))
        print(f"\n{text:28}      us  x floor  vs torch bf16  vs dense bf16  vs dense int8")
        for name, (size, _) in made.items():
            ratios = [median[other] / median[name] for other in ("torch bfloat16", "dense bfloat16", "dense int8 W8A8")]
            floor = median[name] / (size / speed)
            rows[name] = {"bytes": size, "seconds": [round(s, 9) for s in times[name][1:]]}
            print(f"{name:28}{median[name] * 1e6:8.1f}{floor:9.2f}" + "".join(f"{ratio:15.2f}" for ratio in ratios))
        document["shapes"][text] = rows
    if options.o:
        options.o.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
