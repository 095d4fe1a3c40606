"""transformers + torch as a process of its own; see protocol.py.

Settings, chosen to be good for the peer: float32 weights dequantized once, SDPA attention,
`inference_mode`, only the last position's logits in a prefill, a hand-written greedy loop (no
`generate` overhead), and per request either a `DynamicCache` (grows by concatenation), a
`StaticCache` of exactly the length needed, or that static cache with the one-token step compiled by
`torch.compile` (a first, untimed measurement of each shape compiles it).
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

from protocol import serve

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VARIANTS = ("dynamic", "static", "compiled")


class Engine:
    """The loaded model and how it is run; room is made for each request, so none is reserved."""

    def __init__(self, gguf: str, threads: int, **_room: int):
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
        dtype = str(self.model.dtype).removeprefix("torch.")
        self.facts = {
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "threads": torch.get_num_threads(),
            "attention": self.model.config._attn_implementation,
            "variants": list(VARIANTS),
            "weights": dtype,
            "activations": dtype,
            "kv": dtype,
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


if __name__ == "__main__":
    serve(Engine)
