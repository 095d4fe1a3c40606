"""Eight virtual CPU devices for every test (before jax starts); a tiny model and its database."""

import ctypes
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import platform
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

# How long an example took says how busy the machine was.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")


def kept_programs() -> Path:
    """Where compiled programs wait for the next run of the tests: not for another CPU or jaxlib."""
    cpuinfo = Path("/proc/cpuinfo")
    first = cpuinfo.read_text().split("\n\n")[0].splitlines() if cpuinfo.exists() else []
    named = [line for line in first if line.startswith(("model name", "flags", "Features"))]
    cpu = hashlib.sha256("\n".join([platform.machine(), *named]).encode()).hexdigest()[:12]
    version = importlib.metadata.version("jaxlib")
    return Path(__file__).parents[1] / ".cache" / "tests" / f"jaxlib-{version}-{cpu}"


os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# In the environment, so that the processes which tests start read and write there too.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(kept_programs())
    # Small ones too: the tests compile thousands, and reading one takes a tenth of compiling it.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


PAGES = 65
"""Of every database of the tests, so that they share compiled programs; one belongs to nobody."""


@pytest.fixture(scope="module", autouse=True)
def few_compiled_programs() -> Iterator[None]:
    """Lets go of compiled programs when there are very many.

    Each has several maps of memory, of which Linux allows a process 65,530; at the next one the
    compiler crashes. And what its threads have freed, the C library keeps for them: several GB.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        import jax

        jax.clear_caches()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that differ by test and are the same in every run of it."""
    return np.random.default_rng(list(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def tiny_model() -> Any:
    """llama-tiny with random weights that make peaked attention.

    A token is a byte. All output is ASCII; the end ids 1 and 2 are never chosen.
    """
    import jax
    import jax.numpy as jnp
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    import alaya_jax as aj
    from alaya_jax import configs
    from alaya_jax.models import LlamaConfig, bpe, llama
    from alaya_jax.models.tokenizer import Tokenizer

    config = LlamaConfig.from_hf(configs.load("llama-tiny"))
    random = np.random.default_rng(7)

    def weights(path: Any, leaf: Any) -> Any:
        names = [key.key for key in path]
        if names[-1] == "scale":
            return jnp.ones(leaf.shape)
        inputs = leaf.shape[:2] if names[-2] == "o" else leaf.shape[:1]
        gain = {"q": 2.0, "k": 2.0, "o": 3.0, "lm_head": 3.0}
        x = random.standard_normal(leaf.shape, np.float32) * gain.get(names[-2], 1.0)
        if names[-1] == "kernel":
            x /= np.sqrt(np.prod(inputs))
        if names[-2] == "lm_head":
            x *= (np.arange(256) >= ord(" ")) & (np.arange(256) <= ord("~"))
        return jnp.asarray(x)

    params = jax.tree_util.tree_map_with_path(weights, llama.abstract_params(config))
    vocab = dict(bpe.byte_alphabet())
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return aj.Model(config, params, Tokenizer(backend), fingerprint="tiny", name="tiny")


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Callable[..., None]:
    """Writes a random model of two layers, without a tokenizer, as Hugging Face keeps it.

    The first `never` tokens have logit 0, and the likeliest of many others always beats that.
    """
    import json

    from safetensors.numpy import save_file

    from alaya_jax.models import LlamaConfig

    def write(path: Path, vocab_size: int, max_length: int, seed: int, never: int) -> None:
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=max_length,
            eos_token_ids=(1,),
        )
        random = np.random.default_rng(seed)
        e, f, q, kv = 32, 64, 64, 32
        shapes = {"model.embed_tokens": (vocab_size, e), "lm_head": (vocab_size, e)}
        for layer in ("model.layers.0", "model.layers.1"):
            shapes |= {f"{layer}.self_attn.{n}_proj": (kv, e) for n in "kv"}
            shapes |= {f"{layer}.self_attn.q_proj": (q, e), f"{layer}.self_attn.o_proj": (e, q)}
            shapes |= {f"{layer}.mlp.{n}_proj": (f, e) for n in ("gate", "up")}
            shapes |= {f"{layer}.mlp.down_proj": (e, f)}
        tensors = {
            f"{name}.weight": (random.standard_normal(s) / np.sqrt(s[1])).astype(np.float32)
            for name, s in shapes.items()
        }
        tensors["lm_head.weight"][:never] = 0
        for layer in ("model.layers.0", "model.layers.1"):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{layer}.{norm}.weight"] = np.ones(e, np.float32)
        tensors["model.norm.weight"] = np.ones(e, np.float32)
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config.to_hf()))

    return write


@pytest.fixture(scope="session")
def llama3(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., None]
) -> Callable[..., Path]:
    """Writes checkpoints of a tiny model whose tokenizer puts a BOS in front, as Llama 3's does."""
    import json

    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend

    def write(template: str = LLAMA3, path: Path | None = None) -> Path:
        path = path or tmp_path_factory.mktemp("models") / "tiny-llama-3"
        path.mkdir(exist_ok=True)
        names = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=599,  # and one more below: even, so that two devices can share it
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=[AddedToken(n, special=True, normalized=False) for n in names],
            show_progress=False,
        )
        text = Path(__file__).parent / "data" / "declaration.txt"
        backend.train_from_iterator(text.read_text("utf-8").splitlines(), trainer)
        backend.add_tokens([AddedToken("</think>", special=False, normalized=False)])
        bos = names[0]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, 0)]
        )
        tiny_checkpoint(path, backend.get_vocab_size(), 8192, seed=3, never=4)  # control tokens
        (path / "tokenizer.json").write_text(backend.to_str())
        roles = {"bos_token": bos, "eos_token": names[1], "chat_template": template}
        (path / "tokenizer_config.json").write_text(json.dumps(roles))
        return path

    return write


@pytest.fixture
def on_mesh() -> Callable[..., Any]:
    """Lays a model on a mesh: the same weights."""
    import jax

    import alaya_jax as aj
    from alaya_jax.models import llama
    from alaya_jax.sharding import tree_shardings

    def lay(model: Any, mesh: Any, rules: Any = None) -> Any:
        rules = rules or aj.ShardingRules()
        axes = llama.logical_axes(model.config)
        places = tree_shardings(mesh, rules, axes, model.params)
        params = jax.tree.map(jax.device_put, model.params, places)
        where = {"params": params, "mesh": mesh, "rules": rules}
        return dataclasses.replace(model, **where, fingerprint=model.fingerprint)

    return lay


@pytest.fixture
def open_db(tiny_model: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens databases in a directory of the test's own; they are closed at its end."""
    import alaya_jax as aj

    opened = []

    def open(
        model: Any = None,
        path: str = "db",
        pages: int = PAGES,
        indexes: int | str | None = "64MiB",
        **options: Any,
    ) -> Any:
        model = model or tiny_model
        page_size = options.get("page_size", 16)
        budget = aj.Budget.for_pages(model, pages, page_size, indexes=indexes)
        opened.append(aj.DB(tmp_path / path, model, budget, **options))
        return opened[-1]

    yield open
    for db in opened:
        db.close()


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Presses Ctrl-C, which raises KeyboardInterrupt even where the test run ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


@pytest.fixture
def db(open_db: Callable[..., Any]) -> Any:
    """An empty database of the tiny model, 64 pages of 16 tokens."""
    return open_db()


@pytest.fixture(scope="session")
def all_logits(tiny_model: Any) -> Callable[[Any], np.ndarray]:
    """Logits [n, V] of a whole sequence by the model alone: no cache, no pages, no chunks."""
    import jax

    from alaya_jax.models import llama

    @functools.partial(jax.jit, static_argnames="config")
    def forward(params: Any, tokens: Any, config: Any) -> Any:
        positions = np.arange(tokens.shape[1])[None]
        return llama.forward(params, config, tokens, positions, llama.causal_attend)[0]

    def logits(tokens: Any, model: Any = tiny_model) -> np.ndarray:
        padded = np.zeros((1, 256), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(forward(model.params, padded, model.config))[0, : len(tokens)]

    return logits


@pytest.fixture(scope="session")
def greedy(all_logits: Callable[[Any], np.ndarray]) -> Callable[[Any, int], list[int]]:
    """The greedy continuation of a prompt, everything computed anew for each token."""

    def continued(prompt: Any, n: int) -> list[int]:
        tokens = [int(t) for t in prompt]
        for _ in range(n):
            last = all_logits(tokens)[-1]
            best, second = np.partition(last, -2)[[-1, -2]]
            assert best - second > 3e-4, "nearly a tie: rounding decides, another prompt is better"
            tokens.append(int(last.argmax()))
        return tokens[len(prompt) :]

    return continued


@pytest.fixture(scope="session")
def write_old() -> Callable[..., Path]:
    """Writes a context into a database as an earlier version did: (path, name, header, tokens, kv,
    created).
    """
    import dataclasses
    import json
    import zlib

    from alaya_jax.storage.checked import write_array, write_meta
    from alaya_jax.storage.old_directory import BLOCK

    def write(path: Path, name: str, header: Any, tokens: Any, kv: Any, created: float) -> Path:
        directory = path / "contexts" / name
        directory.mkdir(parents=True)
        mark = {"format": "alaya_jax database", "store": "directory", "version": 1}
        (path / "alaya_db.json").write_text(json.dumps(mark))
        checksums = []
        for layer, pair in enumerate(kv):
            rows = [np.ascontiguousarray(half.transpose(1, 0, 2)).view(np.uint8) for half in pair]
            (directory / f"layer_{layer:03d}.kv").write_bytes(b"".join(r.tobytes() for r in rows))
            blocks = range(0, len(tokens), BLOCK)
            checksums.append([[zlib.crc32(r[at : at + BLOCK]) for at in blocks] for r in rows])
        files = {
            "tokens.npy": write_array(directory / "tokens.npy", tokens.astype("<i4")),
            "checksums.npy": write_array(directory / "checksums.npy", np.array(checksums, "<u4")),
        }
        meta = {
            "version": 2,
            "id": name,
            "header": dataclasses.asdict(header),
            "num_tokens": len(tokens),
            "created": created,
            "files": files,
        }
        write_meta(directory, meta)
        return directory

    return write
