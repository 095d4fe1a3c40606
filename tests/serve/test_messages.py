"""Messages and tools as the template of a model reads them."""

import numpy as np
import pytest

from alaya_jax.serve.fields import Refusal
from alaya_jax.serve.protocol import Served

from .conftest import HELLO


def test_a_developer_is_the_system(served: Served):
    newer = served.chat({"messages": [{"role": "developer", "content": "Be brief."}, *HELLO]})
    older = served.chat({"messages": [{"role": "system", "content": "Be brief."}, *HELLO]})
    assert np.array_equal(newer.prompts[0], older.prompts[0])


def test_tools_need_a_template_that_prints_them(served: Served, llama3, open_db):
    import alaya_jax as aj

    tools = [{"type": "function", "function": {"name": "look"}}]
    asked = served.chat({"messages": HELLO, "tools": tools})
    assert asked.tools == {"look"}
    assert "look" in served.db.model.tokenizer.decode(asked.prompts[0])
    none = served.chat({"messages": HELLO, "tools": tools, "tool_choice": "none"})
    assert none.tools == frozenset()
    assert np.array_equal(none.prompts[0], served.chat({"messages": HELLO}).prompts[0])
    blind = Served(open_db(aj.load(str(llama3()), dtype="float32")), "tiny")
    with pytest.raises(Refusal, match="reads none") as refusal:
        blind.chat({"messages": HELLO, "tools": tools})
    assert refusal.value.param == "tools"


def test_calls_that_were_made_reach_the_template_as_objects(served: Served):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    said = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    text = served.db.model.tokenizer.decode(served.chat({"messages": said}).prompts[0])
    assert '{"name": "f", "arguments": {"a": 1}}' in text
