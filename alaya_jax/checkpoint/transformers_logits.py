"""Run by another Python, which has torch and transformers: imports nothing of alaya_jax.

python transformers_logits.py CHECKPOINT REQUEST.json LOGITS.npy

Prints one JSON object: versions, and the ids that the checkpoint's tokenizer gives the text.
"""

import json
import os
import sys


def main(path: str, request: str, result: str) -> None:
    """Logits float32 [T, V] of the request's tokens, to a file."""
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    with open(request, encoding="utf-8") as file:
        wanted = json.load(file)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    with torch.inference_mode():
        logits = model.float().eval()(torch.tensor([wanted["tokens"]])).logits[0]
    np.save(result, logits.float().numpy())
    ids = None
    if any(os.path.exists(os.path.join(path, f"tokenizer.{kind}")) for kind in ("json", "model")):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        ids = list(tokenizer(wanted["text"])["input_ids"])
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps({"versions": versions, "ids": ids}))


if __name__ == "__main__":
    main(*sys.argv[1:])
