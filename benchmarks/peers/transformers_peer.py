"""transformers + torch as a process of its own: JSON lines in on stdin, JSON lines out on stdout.

Runs in the peer environment (see benchmarks/peer.py); computes nothing while it waits for a line.
Requests, one object a line:

    {"op": "load", "gguf": path, "threads": n}
        -> {"versions": {...}, "threads": n, "attention": ..., "dtype": ..., "load_s": ...}
    {"op": "measure", "ids": [[...]], "new_tokens": n, "variant": "dynamic" | "static" | "compiled"}
        -> {"prefill_s": ..., "decode_s": ..., "tokens": [[...]]}
    {"op": "greedy", "ids": [...], "max_new_tokens": n, "eos": id | null}
        -> {"tokens": [...]}
    {"op": "quit"}

A failed request answers {"error": text}. Logs go to stderr.

Settings, chosen to be good for the peer: float32 weights dequantized once, SDPA attention,
`inference_mode`, only the last position's logits in a prefill, a hand-written greedy loop (no
`generate` overhead), and per request either a `DynamicCache` (grows by concatenation), a
`StaticCache` of exactly the length needed, or that static cache with the one-token step compiled by
`torch.compile` (a first, untimed measurement of each shape compiles it).
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Peer:
    """The loaded model and how it is run."""

    def __init__(self, gguf: str, threads: int):
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, GgufConfig

        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        started = time.perf_counter()
        path = Path(gguf)
        self.torch, self.transformers = torch, transformers
        self.model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            attn_implementation="sdpa",
            quantization_config=GgufConfig(dequantize=True),
        ).eval()
        self.compiled = None
        self.facts = {
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "threads": torch.get_num_threads(),
            "attention": self.model.config._attn_implementation,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "load_s": time.perf_counter() - started,
        }

    def cache(self, variant: str, length: int):
        if variant == "dynamic":
            return self.transformers.DynamicCache(config=self.model.config)
        if variant in ("static", "compiled"):
            return self.transformers.StaticCache(config=self.model.config, max_cache_len=length)
        raise ValueError(f"variant {variant!r}: dynamic, static or compiled")

    def measure(self, ids: list[list[int]], new_tokens: int, variant: str) -> dict:
        """Seconds from ids [B,T] to the first token, then of `new_tokens` further greedy steps."""
        torch = self.torch
        if variant == "compiled" and self.compiled is None:
            # one compilation a shape; beyond a limit torch would go on uncompiled, unsaid
            torch._dynamo.config.recompile_limit = 64
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            self.compiled = torch.compile(self.model, dynamic=False)
        with torch.inference_mode():
            prompt = torch.tensor(ids)
            cache = self.cache(variant, prompt.shape[1] + new_tokens)
            started = time.perf_counter()
            out = self.model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            prefilled = time.perf_counter()
            step = self.compiled if variant == "compiled" else self.model
            tokens = [token]
            for _ in range(new_tokens):
                out = step(token, past_key_values=cache, use_cache=True)
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(token)
            finished = time.perf_counter()
        return {
            "prefill_s": prefilled - started,
            "decode_s": finished - prefilled,
            "tokens": torch.cat(tokens, dim=1).tolist(),
        }

    def greedy(self, ids: list[int], max_new_tokens: int, eos: int | None) -> dict:
        """Greedy continuation of one prompt; the eos token, if met, is the last one returned."""
        torch = self.torch
        tokens: list[int] = []
        with torch.inference_mode():
            cache = self.cache("dynamic", 0)
            step = torch.tensor([ids])
            while len(tokens) < max_new_tokens and (not tokens or tokens[-1] != eos):
                out = self.model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                step = out.logits[:, -1].argmax(-1, keepdim=True)
                tokens.append(int(step))
        return {"tokens": tokens}


def main() -> None:
    # Libraries may print: keep the real stdout for answers only.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    peer: Peer | None = None
    for line in sys.stdin:
        request = json.loads(line)
        op = request.pop("op")
        if op == "quit":
            break
        try:
            if op == "load":
                peer = Peer(**request)
                answer = peer.facts
            elif peer is None:
                raise ValueError("the first request must be 'load'")
            else:
                answer = {"measure": peer.measure, "greedy": peer.greedy}[op](**request)
        except Exception as error:  # reported to the caller, who decides
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
