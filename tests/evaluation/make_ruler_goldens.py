"""Digests of what RULER's published generators make of `ruler_source`, into ruler_goldens.json.

    pip download --no-deps nvidia-long-context-eval==26.3
    unzip -d DIR nvidia_long_context_eval-26.3-*.whl
    python tests/evaluation/make_ruler_goldens.py DIR      # in an environment with scipy and tqdm

The generators run as they are, but for where words, essays, sentences, tokens and questions come
from.
"""

import contextlib
import hashlib
import io
import json
import runpy
import shutil
import sys
import tempfile
import types
from pathlib import Path

from tests.evaluation import ruler_source

HERE = Path(__file__).resolve().parent
LENGTHS = (1024, 4096)
ITEMS = 3
ARGUMENTS = {
    "niah_single_1": ("niah", {"type_haystack": "repeat"}),
    "niah_single_2": ("niah", {}),
    "niah_single_3": ("niah", {"type_needle_v": "uuids"}),
    "niah_multikey_1": ("niah", {"num_needle_k": 4}),
    "niah_multikey_2": ("niah", {"type_haystack": "needle"}),
    "niah_multikey_3": (
        "niah",
        {"type_haystack": "needle", "type_needle_k": "uuids", "type_needle_v": "uuids"},
    ),
    "niah_multivalue": ("niah", {"num_needle_v": 4}),
    "niah_multiquery": ("niah", {"num_needle_q": 4}),
    "vt": ("variable_tracking", {"num_chains": 1, "num_hops": 4}),
    "cwe": ("common_words_extraction", {"freq_cw": 30, "freq_ucw": 3, "num_cw": 10}),
    "fwe": ("freq_words_extraction", {"alpha": 2.0}),
    "qa_1": ("qa", {"dataset": "squad"}),
    "qa_2": ("qa", {"dataset": "hotpotqa"}),
}


class Tokens:
    def text_to_tokens(self, text: str) -> range:
        return range(ruler_source.count(text))


def stand_ins() -> None:
    """What the generators import and we have no need of."""
    lists = {
        "nounlist.txt": ruler_source.WORDS.nouns,
        "adjectivelist.txt": ruler_source.WORDS.adjectives,
        "verblist.txt": ruler_source.WORDS.verbs,
    }
    words = types.SimpleNamespace(_get_words_from_text_file=lambda name: list(lists[name]))
    made = {
        "wonderwords": {"random_word": words},
        "nltk": {},
        "nltk.tokenize": {"sent_tokenize": ruler_source.sentences},
        "tokenizer": {"select_tokenizer": lambda *_: Tokens()},
        "long_context_eval.data.tokenizer": {"select_tokenizer": lambda *_: Tokens()},
        "long_context_eval.pred.nemo_utils": {"write_manifest": write},
    }
    for name, attributes in made.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module


def write(path: Path, rows: list) -> None:
    path.write_text(json.dumps(rows))


def digest(text: str, answers: list) -> str:
    return hashlib.sha256(json.dumps([text, answers]).encode()).hexdigest()[:16]


def main() -> None:
    wheel = Path(sys.argv[1])
    goldens = {}
    with tempfile.TemporaryDirectory() as scratch:
        copied = Path(scratch) / "long_context_eval" / "data" / "synthetic"
        shutil.copytree(wheel / "long_context_eval", Path(scratch) / "long_context_eval")
        (copied / "json" / "PaulGrahamEssays.json").write_text(
            json.dumps({"text": ruler_source.TEXT})
        )
        (copied / "json" / "squad.json").write_text(ruler_source.squad())
        (copied / "json" / "hotpotqa.json").write_text(ruler_source.hotpotqa())
        sys.path[:0] = [scratch, str(copied)]
        stand_ins()
        templates = runpy.run_path(str(copied / "constants.py"))["TASKS"]
        for task, (script, arguments) in ARGUMENTS.items():
            template = templates[script]["template"] + templates[script]["answer_prefix"]
            for length in LENGTHS:
                given = {
                    "save_dir": scratch,
                    "save_name": task,
                    "tokenizer_path": "none",
                    "max_seq_length": length,
                    "tokens_to_generate": templates[script]["tokens_to_generate"],
                    "num_samples": ITEMS,
                    "template": template,
                    **arguments,
                }
                sys.argv = [script]
                for name, value in given.items():
                    sys.argv += [f"--{name}", str(value)]
                with (
                    contextlib.redirect_stdout(io.StringIO()),
                    contextlib.redirect_stderr(io.StringIO()),
                ):
                    runpy.run_path(str(copied / f"{script}.py"), run_name="__main__")
                rows = json.loads((Path(scratch) / task / "validation.jsonl").read_text())
                goldens[f"{task} {length}"] = [digest(r["input"], r["outputs"]) for r in rows]
    lines = [f'"{name}": {json.dumps(found)}' for name, found in goldens.items()]
    (HERE / "ruler_goldens.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
