"""torch's attention of one decode step as a process of its own; see protocol.py.

    {"op": "load", "kv_heads": K, "group": G, "dim": D, "threads": n} -> {"versions": {...}}
    {"op": "measure", "length": S, "repeats": n}
        -> {"seconds": {variant: [...]}}    each variant n times, by turns

Variants: scaled_dot_product_attention with `enable_gqa`, the same with the heads of a group as the
query's tokens (no key is read twice), plain grouped matmuls; float32, and the second in bfloat16.
"""

from __future__ import annotations

import time

from protocol import serve


class Engine:
    """Shapes, and the keys of the length asked for last."""

    def __init__(self, kv_heads: int, group: int, dim: int, threads: int):
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.torch = torch
        self.shape = (kv_heads, group, dim)
        self.facts = {"versions": {"torch": torch.__version__}, "threads": threads}

    def variants(self, length: int) -> dict:
        """Functions of no argument."""
        torch = self.torch
        kv_heads, group, dim = self.shape
        q = torch.randn(1, kv_heads * group, 1, dim)
        k, v = (torch.randn(1, kv_heads, length, dim) for _ in range(2))
        rows = q.reshape(1, kv_heads, group, dim)
        half = [x.bfloat16() for x in (rows, k, v)]
        sdpa = torch.nn.functional.scaled_dot_product_attention

        def matmuls():
            scores = rows @ k.transpose(-1, -2) * dim**-0.5
            return torch.softmax(scores, dim=-1) @ v

        return {
            "sdpa_gqa_f32": lambda: sdpa(q, k, v, enable_gqa=True),
            "sdpa_grouped_f32": lambda: sdpa(rows, k, v),
            "matmul_grouped_f32": matmuls,
            "sdpa_grouped_bf16": lambda: sdpa(*half),
        }

    def measure(self, length: int, repeats: int) -> dict:
        """Seconds of each call; the first round is not counted."""
        variants = self.variants(length)
        seconds = {name: [] for name in variants}
        with self.torch.inference_mode():
            for turn in range(repeats + 1):
                for name, call in variants.items():
                    started = time.perf_counter()
                    call()
                    if turn:
                        seconds[name].append(time.perf_counter() - started)
        return {"seconds": seconds}


if __name__ == "__main__":
    serve(Engine)
