"""OpenVINO GenAI as a process of its own; see protocol.py.

Settings, chosen to be good for the peer: the pipeline with continuous batching and paged attention
(what `LLMPipeline` uses on a CPU), the latency hint, blocks for all keys and values reserved when
loading, no prefix caching, and prompts computed whole: all of them in the first step.

What it makes of a GGUF file, read from the model that it builds (2026.4.1): Q4_0, Q4_1 and Q4_K
become 4-bit numbers in groups of 32 with a float16 scale and a 4-bit zero point, so the minimum of
a Q4_1 block is rounded to a multiple of its scale; Q8_0 and Q6_K become 8-bit numbers likewise, in
groups of 32 and 16; anything else float16. Other types are refused.
"""

from __future__ import annotations

import platform
import time
from importlib import metadata

from protocol import serve

BLOCK = 32  # tokens of a block of keys and values, on a CPU


class Engine:
    """The pipeline."""

    def __init__(self, gguf: str, threads: int, batch: int, length: int):
        import openvino
        import openvino_genai

        started = time.perf_counter()
        self.openvino, self.genai = openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = batch
        scheduler.max_num_batched_tokens = batch * length
        scheduler.num_kv_blocks = batch * (-(-length // BLOCK) + 1)
        scheduler.enable_prefix_caching = False
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            gguf,
            scheduler,
            "CPU",
            {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"},
        )
        self.requests = 0
        core = openvino.Core()
        default = {
            name: core.get_property("CPU", name)
            for name in (
                "INFERENCE_PRECISION_HINT",
                "DYNAMIC_QUANTIZATION_GROUP_SIZE",
                "KEY_CACHE_PRECISION",
                "VALUE_CACHE_PRECISION",
            )
        }
        precision = default["INFERENCE_PRECISION_HINT"].to_string()
        group = default["DYNAMIC_QUANTIZATION_GROUP_SIZE"]
        kv = {default[f"{name}_CACHE_PRECISION"].to_string() for name in ("KEY", "VALUE")}
        self.facts = {
            "versions": {
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in ("openvino", "openvino-genai")},
            },
            "threads": threads,
            "load_s": time.perf_counter() - started,
            "variants": ["whole"],
            "weights": "the file's blocks, zero points rounded",
            "activations": f"{precision}, in products int8 by {group}" if group else precision,
            "kv": ", ".join(sorted(kv)),
        }

    def measure(self, ids: list[list[int]], new_tokens: int, variant: str) -> dict:
        """See protocol.py; there is one variant."""
        import numpy as np

        config = self.genai.GenerationConfig()
        config.max_new_tokens = new_tokens + 1
        config.do_sample, config.ignore_eos = False, True
        tokens: list[list[int]] = [[] for _ in ids]
        started = time.perf_counter()
        handles = []
        for row in ids:
            prompt = self.openvino.Tensor(np.array([row], np.int64))
            handles.append(self.pipeline.add_request(self.requests, prompt, config))
            self.requests += 1
        first = 0.0
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            for row, handle in zip(tokens, handles, strict=True):
                while handle.can_read():
                    for output in handle.read().values():
                        row += output.generated_ids
            if not first and all(tokens):
                first = time.perf_counter()
        finished = time.perf_counter()
        made = [len(row) for row in tokens]
        if made != [new_tokens + 1] * len(ids):
            raise RuntimeError(f"asked for {new_tokens + 1} tokens a sequence, made {made}")
        return {"prefill_s": first - started, "decode_s": finished - first, "tokens": tokens}


if __name__ == "__main__":
    serve(Engine)
