"""Chat templates: what Hugging Face templates rely on, and what foreign code must not do."""

from datetime import date, datetime

import pytest

from alaya_jax.errors import RequestError, TokenizerError
from alaya_jax.models.chat import ChatTemplate

USER = {"role": "user", "content": "hi"}


def render(source, messages=(USER,), *arguments, **variables) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(
        list(messages), *arguments, **variables
    )


def test_header_style_conversation():
    """The form of Llama 3's conversations."""
    source = """
{%- for message in messages %}
    {%- set turn = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' %}
    {%- set turn = turn + message['content'] | trim + '<|eot_id|>' %}
    {%- if loop.first %}{% set turn = bos_token + turn %}{% endif %}
    {{- turn }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""
    messages = [{"role": "system", "content": " Be brief. "}, USER]
    text = (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    )
    assert render(source, messages, False) == text
    prompt = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert render(source, messages) == text + prompt


def test_blocks_leave_no_white_space():
    assert render("{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\ny") == "x\ny"


def test_json_is_plain():
    value = {"b": "<é>&'", "a": [1, None, True]}
    assert render("{{ v | tojson }}", v=value) == '{"b": "<é>&\'", "a": [1, null, true]}'
    assert render("{{ v | tojson(indent=2) }}", v={"a": 1}) == '{\n  "a": 1\n}'
    assert render("{{ v | tojson(sort_keys=true) }}", v={"b": 1, "a": 2}) == '{"a": 2, "b": 1}'


def test_time_and_variables():
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year)}
    source = "{{ date_string if date_string is defined else 'no date' }}"
    assert render(source) == "no date"
    assert render(source, date_string="26 Jul 2024") == "26 Jul 2024"


def test_tools_and_documents_are_none_unless_given():
    source = "{{ tools is none }} {{ documents is none }}"
    assert render(source) == "True True"
    assert render(source, tools=[{"name": "f"}], documents=[{"title": "t"}]) == "False False"


def test_loop_controls_and_namespaces():
    source = (
        "{% set ns = namespace(n=0) %}{% for i in range(9) %}{% if i == 1 %}{% continue %}"
        "{% endif %}{% if i == 4 %}{% break %}{% endif %}{% set ns.n = ns.n + i %}{% endfor %}"
        "{{ ns.n }}"
    )
    assert render(source) == "5"


def test_generation_blocks_print_and_keep_their_variables():
    source = (
        "{% set x = 1 %}{% generation %}{% set x = 2 %}said {{ x }}{% endgeneration %}, {{ x }}"
    )
    assert render(source) == "said 2, 1"


def test_the_template_refuses_in_its_own_words():
    source = "{{ raise_exception('Roles must alternate!') }}"
    with pytest.raises(TokenizerError, match="refuses these messages: Roles must alternate!"):
        render(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", "'default' is not valid Jinja: line 2"),
        ("{{ messages[0].content + 1 }}", "TypeError.*content has the form"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
    ],
)
def test_templates_that_fail(source, message):
    with pytest.raises(TokenizerError, match=message):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ '%s' | attr('__class__') }}{{ cycler.__init__.__globals__ }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_templates_stay_in_the_sandbox(source):
    with pytest.raises(TokenizerError):
        render(source)


def test_templates_see_data_only():
    with pytest.raises(RequestError, match="messages must be plain JSON"):
        render("x", [{"role": "user", "content": object()}])
    with pytest.raises(RequestError, match="tools must be plain JSON"):
        render("x", tools=[print])
    with pytest.raises(RequestError, match="image must be plain JSON"):
        render("x", image=b"bytes")


@pytest.mark.parametrize("messages", ["hi", USER, 3, ["hi"], [USER, {"content": "no role"}]])
def test_messages_of_another_form(messages):
    with pytest.raises(RequestError, match=r"messages must be a list|message \d must be a mapping"):
        ChatTemplate("x").render(messages)


def test_named_templates_need_a_default_only_when_it_is_used():
    chat = ChatTemplate({"tool_use": "T", "rag": "R"})
    assert chat.render([USER], tools=[]) == "T"
    with pytest.raises(TokenizerError, match=r"tool_use, rag.*'default'"):
        chat.render([USER])


def test_what_a_template_does_not_read_is_refused():
    source = "{% if enable_thinking is defined %}on{% endif %}{{ messages[0].content }}"
    assert render(source, enable_thinking=True) == "onhi"
    for name in ("add_genration_prompt", "chat_template", "tokenize"):
        with pytest.raises(RequestError, match=f"reads no {name}; .*it reads enable_thinking"):
            render(source, **{name: True})


TURNS = "{% for m in messages %}[{{ m.role }}]{{ CONTENT }}[end]{% endfor %}" + (
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(
    ("content", "said", "expected"),
    [
        ("m.content", "The river ", "The river "),
        ("m.content | trim", "The river ", "The river"),
        ("m.content[0].text", [{"type": "text", "text": "The river"}], "The river"),
    ],
)
def test_a_final_message_is_continued(content, said, expected):
    messages = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
    source = TURNS.replace("CONTENT", content)
    closed = render(source, messages, False)
    goes_on = render(source, messages, continue_final_message=True)
    assert goes_on == closed.removesuffix("[end]")[: len(goes_on)]
    assert goes_on.endswith(f"[assistant]{expected}")
    assert render(source, messages, False, continue_final_message=True) == goes_on


@pytest.mark.parametrize(
    ("source", "messages", "options", "error"),
    [
        (TURNS, (USER,), {"add_generation_prompt": True}, "leave one of them out"),
        ("x", ({"role": "assistant", "content": None},), {}, "no text to go on with"),
        ("x", (), {}, "no text to go on with"),
        ("x", (USER,), {}, "does not print the last message"),
    ],
)
def test_a_final_message_that_cannot_be_continued(source, messages, options, error):
    source = source.replace("CONTENT", "m.content")
    with pytest.raises((RequestError, TokenizerError), match=error):
        render(source, messages, continue_final_message=True, **options)


def test_a_date_is_printed_where_a_template_prints_one():
    day = date(2024, 7, 26)
    assert render("{{ strftime_now('%d %b %Y') }}", date=day) == "26 Jul 2024"
    named = "{{ date_string if date_string is defined else 'no date' }}"
    assert render(named, date=day) == "26 Jul 2024"
    either = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%Y') %}{% endif %}"
    )
    assert render(either + "{{ date_string }}", date=day) == "2024"
    with pytest.raises(RequestError, match="prints no date"):
        render("x", date=day)


def test_what_is_none_in_a_message_is_not_there():
    """As in transformers 5: templates would print "None"."""
    turn = {"role": "assistant", "content": None, "tool_calls": [{"name": None}]}
    source = "[{{ messages[0].content }}]{{ messages[0].tool_calls[0].name is none }}"
    assert render(source, [turn]) == "[]True"
