"""Clients that others wrote, where they are installed: pip install openai langchain-openai
"lm-eval[api]", in an environment that has alaya_jax too.
"""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import alaya_jax as aj
from alaya_jax.engine import Engine

from .conftest import HELLO

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

GREEDY: dict[str, Any] = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def url(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a server of this process answers."""
    import uvicorn

    from alaya_jax.serve import run
    from alaya_jax.serve.app import create_app
    from alaya_jax.serve.service import Service

    def start() -> Engine:
        budget = aj.Budget.for_pages(model, 257, indexes="64MiB")
        return Engine(aj.DB(tmp_path_factory.mktemp("served"), model, budget))

    service = Service(start, "tiny")
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning"))
    with run.listen("127.0.0.1", 0) as socket:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        service.wait()
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def test_openai(url):
    openai = pytest.importorskip("openai", reason="openai is not installed")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["tiny"]
    whole = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=2)
    text = whole.choices[0].message.content
    content = whole.choices[0].logprobs.content
    assert len(content) == whole.usage.completion_tokens == 8
    assert all(len(token.top_logprobs) == 2 for token in content)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.chat.completions.create(**GREEDY, **options)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
    assert last.usage == whole.usage
    planned = client.chat.completions.create(**GREEDY, extra_body={"attention": "window"})
    assert planned.usage.attention == "window"
    echoed = client.completions.create(model="tiny", prompt="Once", echo=True, logprobs=1)
    assert echoed.choices[0].text.startswith("Once")
    assert echoed.choices[0].logprobs.token_logprobs[0] is None
    odd = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**GREEDY, response_format=odd)
    assert refused.value.param == "response_format"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**GREEDY | {"model": "other"})
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    answered = client.chat.completions.create(**GREEDY, tools=tools)
    assert answered.choices[0].message.tool_calls is None

    async def several() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            answers = [client.chat.completions.create(**GREEDY) for _ in range(5)]
            return [a.choices[0].message.content for a in await asyncio.gather(*answers)]

    assert asyncio.run(several()) == [text] * 5


def test_openai_parses_what_must_be(url):
    """A format and a forced call from the client's own schemas, whole and streamed."""
    openai = pytest.importorskip("openai", reason="openai is not installed")
    pydantic = pytest.importorskip("pydantic")
    short = pydantic.Field(max_length=4)
    part = pydantic.create_model("Part", name=(str, short))
    thing = pydantic.create_model(
        "Thing", size=(int | None, pydantic.Field(le=99)), parts=(list[part], short)
    )
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    asked = GREEDY | {"temperature": 2, "seed": 4, "max_tokens": 400}
    parsed = client.chat.completions.parse(**asked, response_format=thing)
    assert isinstance(parsed.choices[0].message.parsed, thing)
    with client.chat.completions.stream(**asked, response_format=thing) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == parsed.choices[0].message.parsed
    tools = [openai.pydantic_function_tool(thing, name="make")]
    for choice in ("required", {"type": "function", "function": {"name": "make"}}):
        said = client.chat.completions.create(**asked, tools=tools, tool_choice=choice)
        (call,) = said.choices[0].message.tool_calls
        assert call.function.name == "make"
        thing.model_validate_json(call.function.arguments)


def test_langchain(url):
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    chat = langchain.ChatOpenAI(
        model="tiny", base_url=f"{url}/v1", api_key="none", temperature=0, max_tokens=8
    )
    whole = chat.invoke("Hello")
    assert whole.usage_metadata["output_tokens"] == 8
    assert "".join(piece.content for piece in chat.stream("Hello")) == whole.content
    assert [answer.content for answer in chat.batch(["Hello", "Hello"])] == [whole.content] * 2


def test_lm_eval_scores_what_the_library_scores(url, model, tmp_path, open_db):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    pytest.importorskip("tenacity", reason="lm-eval[api] is not installed")
    rows = [
        {"q": "Once upon", "choices": [" a time", " two times", " the top"], "gold": 0},
        {"q": "We the", "choices": [" People", " Persons"], "gold": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(
        "task: two_rows\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'rows.jsonl'}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}'\n"
        "doc_to_target: gold\ndoc_to_choice: '{{choices}}'\ntarget_delimiter: ''\n"
        "metric_list:\n  - metric: acc\n"
    )
    found = lm_eval.simple_evaluate(
        "local-completions",
        model_args={
            "model": "tiny",
            "base_url": f"{url}/v1/completions",
            "tokenizer_backend": "remote",
            "max_length": 2048,
        },
        tasks=["two_rows"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path)),
        log_samples=True,
    )
    db = open_db(model)
    for row, sample in zip(rows, found["samples"]["two_rows"], strict=True):
        prompt = model.encode(row["q"], add_special_tokens=False)
        for choice, (logprob, is_greedy) in zip(
            row["choices"], sample["filtered_resps"], strict=True
        ):
            whole = model.encode(row["q"] + choice, add_special_tokens=False)
            (score,) = aj.score(db, [prompt], [whole[len(prompt) :]])
            assert float(logprob) == pytest.approx(score.logprob, abs=1e-4)
            assert is_greedy in (score.is_greedy, str(score.is_greedy))
