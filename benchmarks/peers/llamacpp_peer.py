"""llama.cpp as a process of its own; see protocol.py.

Its server, in this process (xllamacpp): one request holds all prompts, each goes to a slot, and the
answer has the tokens and llama.cpp's own times, which leave out the server around them.

Settings, chosen to be good for the peer: llama.cpp's defaults for attention (flash attention where
it can), keys and values (float16) and the tokens computed at once (512); a slot a sequence with
keys and values apart; batches that hold all prompts, so that no sequence decodes while another is
read; nothing of an earlier prompt kept or looked for; greedy by the cheapest chain of samplers.
"""

from __future__ import annotations

import http.client
import json
import platform
import time
from importlib import metadata
from urllib.parse import urlsplit

from protocol import serve

PAD = 256  # llama.cpp rounds a sequence's length up to so many tokens


class Engine:
    """The server, which listens on this machine only."""

    def __init__(self, gguf: str, threads: int, batch: int, length: int):
        import xllamacpp

        started = time.perf_counter()
        params = xllamacpp.CommonParams()
        params.model.path = gguf
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_parallel = batch
        params.n_ctx = batch * -(-length // PAD) * PAD
        params.n_batch = batch * length
        params.kv_unified = False
        params.cache_prompt = params.cache_idle_slots = False
        params.cache_ram_mib = params.n_ctx_checkpoints = 0
        params.fit_params = False  # the settings are as said, or loading fails
        params.verbosity = 1
        self.server = xllamacpp.Server(params)
        kv = {xllamacpp.ggml_type(kind).name for kind in (params.cache_type_k, params.cache_type_v)}
        self.facts = {
            "versions": {
                "python": platform.python_version(),
                "xllamacpp": metadata.version("xllamacpp"),
            },
            "threads": threads,
            "load_s": time.perf_counter() - started,
            "system": xllamacpp.get_system_info().strip(),
            "variants": ["server"],
            "weights": "the file's blocks",
            "activations": "float32, in products of blocks int8 by 32",
            "kv": ", ".join(sorted(name.removeprefix("GGML_TYPE_").lower() for name in kv)),
        }

    def measure(self, ids: list[list[int]], new_tokens: int, variant: str) -> dict:
        """See protocol.py; there is one variant."""
        request = {
            "prompt": ids,
            "n_predict": new_tokens + 1,
            "ignore_eos": True,
            "samplers": ["top_k"],
            "top_k": 1,
            "temperature": 0.0,
            "cache_prompt": False,
            "return_tokens": True,
        }
        connection = http.client.HTTPConnection(urlsplit(self.server.listening_address).netloc)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/completion", json.dumps(request), headers)
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        if response.status != http.client.OK:
            raise RuntimeError(f"the server answered {response.status}: {answer}")
        answers = answer if isinstance(answer, list) else [answer]
        answers.sort(key=lambda one: one["index"])
        made = [len(one["tokens"]) for one in answers]
        if made != [new_tokens + 1] * len(ids):
            raise RuntimeError(f"asked for {new_tokens + 1} tokens a sequence, made {made}")
        seconds = {
            name: max(one["timings"][f"{name}_ms"] for one in answers) / 1000
            for name in ("prompt", "predicted")
        }
        return {
            "prefill_s": seconds["prompt"],
            "decode_s": seconds["predicted"],
            "tokens": [one["tokens"] for one in answers],
        }


if __name__ == "__main__":
    serve(Engine)
