"""What lm-eval's `hf` model finds of SmolLM2 on the tasks beside this file, into goldens.json.

    alaya convert smollm2-135m DIR
    python tests/evaluation/make_goldens.py DIR     # with lm-eval, torch and transformers

Nothing is downloaded. Needs the peers' environment; the tests only read what it writes.
"""

import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TASKS = ["local_capitals", "local_passages", "local_answers"]


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    directory = sys.argv[1]
    lm = HFLM(pretrained=directory, dtype="float32", device="cpu")
    os.chdir(HERE / "local")  # where the tasks' files are looked for
    manager = TaskManager(include_path=".")
    found = lm_eval.simple_evaluate(model=lm, tasks=TASKS, task_manager=manager)["samples"]
    pairs, texts, answers = [], [], []
    for sample in found["local_capitals"]:
        for (context, continuation), ((logprob, greedy),) in zip(
            sample["arguments"], sample["resps"], strict=True
        ):
            prompt, completion = lm._encode_pair(context, continuation)
            ids = {"prompt": prompt, "completion": completion}
            pairs.append({**ids, "logprob": float(logprob), "is_greedy": bool(greedy)})
    for sample in found["local_passages"]:
        (((text,),), ((logprob,),)) = (sample["arguments"], sample["resps"])
        ids = {"ids": lm.tok_encode(text), "first": lm.prefix_token_id}
        texts.append({**ids, "logprob": float(logprob)})
    for sample in found["local_answers"]:
        (((text, settings),), ((answer,),)) = (sample["arguments"], sample["resps"])
        answers.append({"prompt": lm.tok_encode(text), "settings": settings, "answer": answer})
    rows = {"pairs": pairs, "texts": texts, "answers": answers}
    parts = [
        f'"{name}": [\n' + ",\n".join(json.dumps(row) for row in found) + "\n]"
        for name, found in rows.items()
    ]
    (HERE / "goldens.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
