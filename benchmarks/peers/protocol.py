"""What every peer speaks: JSON lines in on stdin, one JSON line out for each on stdout.

A peer runs in an environment of its own (see environment.py) and computes nothing while it waits
for a line. Requests, one object a line: first a "load", then any number of "measure". What engines
that run a model are asked and answer (attention_peer.py has its own):

    {"op": "load", "gguf": path, "threads": n, "batch": most sequences, "length": longest, tokens}
        -> {"versions": {...}, "threads": n, "load_s": ..., "variants": [names, to choose from],
            "weights": ..., "activations": ..., "kv": what it computes with, in words}
    {"op": "measure", "ids": [[...]], "new_tokens": n, "variant": name}
        -> {"prefill_s": ..., "decode_s": ..., "tokens": [[...]]}
           seconds from `ids` to every sequence's first token, then to `new_tokens` more of each;
           the first measurement of a shape may compile

A failed request answers {"error": text}. Logs go to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def serve(engine: Callable[..., Any]) -> None:
    """Answers requests until stdin ends.

    Args:
      engine: takes what "load" brings; has `facts` and `measure`.
    """
    # Libraries may print: keep the real stdout for answers only.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    loaded = None
    for line in sys.stdin:
        request = json.loads(line)
        op = request.pop("op")
        try:
            if op == "load":
                loaded = engine(**request)
                answer = loaded.facts
            elif loaded is None:
                raise ValueError("the first request must be 'load'")
            elif op == "measure":
                answer = loaded.measure(**request)
            else:
                raise ValueError(f"op {op!r}: load or measure")
        except Exception as error:  # reported to the caller, who decides
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
