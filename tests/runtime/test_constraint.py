"""What a text must be, and which ids may come next: against jsonschema, re, and the definition."""

import builtins
import json
import re

import jsonschema
import numpy as np
import pytest

import alaya_jax as aj
from alaya_jax.errors import RequestError, TokenizerError
from alaya_jax.runtime.sampling.constraint import Allowed, Constraint, everything

SIZE = 256
END = 2


def ids(mask: np.ndarray) -> set[int]:
    return {i for i in range(len(mask) * 32) if mask[i // 32] >> i % 32 & 1}


def follow(tokenizer, constraint=None, least=0, ends=(END,)) -> Allowed:
    return Allowed(constraint, least, ends, tokenizer, SIZE)


def walk(allowed: Allowed, random: np.random.Generator, most: int) -> bytes:
    """Chooses at random among what may come; after `most` tokens it ends as soon as it can."""
    said = bytearray()
    while True:
        may = ids(allowed.mask())
        assert may
        closing = [i for i in (END, *b'"}]0') if i in may]
        late = len(said) >= most and closing
        id = closing[0] if late else int(random.choice(sorted(may)))
        allowed.accept(id)
        if id == END:
            return bytes(said)
        said.append(id)


SCHEMAS = [
    {"type": "object"},
    {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 70}, "minItems": 2},
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "kind": {"enum": ["a", 1, None]},
            "more": {"anyOf": [{"type": "boolean"}, {"$ref": "#/$defs/n"}]},
        },
        "required": ["name", "more"],
        "additionalProperties": False,
        "$defs": {"n": {"type": "number"}},
    },
    {"type": "string", "pattern": "^[a-c]{2,4}$"},
    {"type": "array", "prefixItems": [{"const": {"a": [1]}}, {"type": "null"}], "items": False},
    {},
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: json.dumps(s)[:30])
def test_what_random_choices_say_is_valid(tiny_model, rng, schema):
    tokenizer = tiny_model.tokenizer
    constraint = Constraint(json_schema=schema)
    for _ in range(8):
        said = walk(follow(tokenizer, constraint), rng, 40).decode()
        jsonschema.validate(json.loads(said), schema)


def any_schema(random: np.random.Generator, depth: int = 0) -> dict:
    """A schema of few words, of objects and lists in one another."""
    kinds = ["string", "integer", "boolean", "null", "enum", "object", "array", "anyOf"]
    match str(random.choice(kinds[: 8 if depth < 3 else 5])):
        case "string":
            return {"type": "string", "maxLength": int(random.integers(9))}
        case "integer":
            low = int(random.integers(-50, 50))
            return {"type": "integer", "minimum": low, "maximum": low + int(random.integers(99))}
        case "enum":
            return {"enum": [["a", 1], {"b": None}, "é\n", -2.5][: random.integers(1, 5)]}
        case "object":
            names = [str(name) for name in random.permutation(["a", "b c", 'd"', "é"])]
            return {
                "type": "object",
                "properties": {name: any_schema(random, depth + 1) for name in names},
                "required": names[: random.integers(5)],
                "additionalProperties": False,
            }
        case "array":
            least = int(random.integers(3))
            inner = any_schema(random, depth + 1)
            return {"type": "array", "items": inner, "minItems": least, "maxItems": least + 2}
        case "anyOf":
            return {"anyOf": [any_schema(random, depth + 1) for _ in range(2)]}
        case kind:
            return {"type": kind}


def test_what_random_choices_say_is_valid_by_random_schemas(tiny_model, rng):
    for _ in range(60):
        schema = any_schema(rng)
        said = walk(follow(tiny_model.tokenizer, Constraint(json_schema=schema)), rng, 60)
        jsonschema.validate(json.loads(said), schema)


def test_a_regular_expression_and_a_grammar(tiny_model, rng):
    pattern = r"(yes|no), [a-zé]{2,5}\."
    lark = 'start: "(" start? ")"'
    for _ in range(20):
        said = walk(follow(tiny_model.tokenizer, Constraint(regex=pattern)), rng, 99)
        assert re.fullmatch(pattern, said.decode())
        said = walk(follow(tiny_model.tokenizer, Constraint(lark=lark)), rng, 9).decode()
        assert said == "(" * (len(said) // 2) + ")" * (len(said) // 2)


def test_no_more_and_no_less_than_may_come(tiny_model):
    """A text may end where it may end, by each of the ids that end it, and nowhere else."""
    allowed = follow(tiny_model.tokenizer, Constraint(regex="ab?"), ends=(END, 7, ord("b")))
    assert ids(allowed.mask()) == {ord("a")}
    allowed.accept(ord("a"))
    assert ids(allowed.mask()) == {END, 7, ord("b")}
    assert ids(allowed.mask()) == {END, 7, ord("b")}, "looking changes nothing"
    allowed.accept(7)
    assert ids(allowed.mask()) == ids(everything(SIZE)) == set(range(256))


def test_white_space_has_an_end(tiny_model):
    allowed = follow(tiny_model.tokenizer, Constraint(json_schema={"type": "array"}))
    allowed.accept(ord("["))
    spaces = 0
    while ord(" ") in ids(allowed.mask()):
        allowed.accept(ord(" "))
        spaces += 1
    assert spaces == 40


def test_as_many_tokens_as_must_be(tiny_model):
    allowed = follow(None, least=2, ends=(END, 9))
    for _ in range(2):
        assert ids(allowed.mask()) == set(range(256)) - {END, 9}
        allowed.accept(5)
    assert ids(allowed.mask()) == set(range(256))
    # A constraint that is met, and lets nothing follow, comes first.
    short = follow(tiny_model.tokenizer, Constraint(regex="ab*c"), least=3)
    for letter in b"ac":
        assert END not in ids(short.mask())
        short.accept(letter)
    assert ids(short.mask()) == {END}
    early = follow(tiny_model.tokenizer, Constraint(regex="ab*"), least=3)
    early.accept(ord("a"))
    assert ids(early.mask()) == {ord("b")}


def test_control_tokens_are_no_text(llama3):
    """Nor is padding behind the tokenizer's ids."""
    model = aj.load(str(llama3()), dtype="float32")
    size = model.config.vocab_size + 37
    allowed = Allowed(Constraint(regex=r"(.|\n)*"), 0, model.eos_ids, model.tokenizer, size)
    may = ids(allowed.mask())
    assert may.isdisjoint(model.tokenizer.special_ids - set(model.eos_ids))
    assert max(may) < model.config.vocab_size
    assert set(model.eos_ids) <= may
    assert int(model.encode("Once", add_special_tokens=False)[0]) in may


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "give one of"),
        ({"regex": "a", "lark": 'start: "a"'}, "give one of"),
        ({"regex": "[a"}, "unclosed"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": 5}, "must be a text"),
        ({"lark": "begin: 5"}, "lark"),
        ({"json_schema": {"not": {}, "type": "object"}}, "not"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        (
            {
                "json_schema": {
                    "type": "array",
                    "uniqueItems": True,
                    "x-guidance": {"lenient": True},
                }
            },
            "uniqueItems",
        ),
        ({"json_schema": {"type": "shape"}}, "shape"),
        ({"json_schema": {"enum": []}}, "nsatisfiable"),
        ({"json_schema": {"$ref": "https://example.org/a"}}, "example.org"),
        ({"json_schema": "{"}, "JSON"),
        ({"json_schema": [1]}, "object"),
        ({"json_schema": True}, "object"),
        ({"json_schema": {"const": {1, 2}}}, "JSON"),
    ],
    ids=str,
)
def test_what_is_not_understood_is_refused(settings, said):
    with pytest.raises(RequestError, match=said):
        Constraint(**settings)


def test_refused_before_a_text_begins(tiny_model):
    constraint = Constraint(regex="a")
    with pytest.raises(RequestError, match=r"ends its text.*ignore_eos.*stop_ids"):
        follow(tiny_model.tokenizer, constraint, ends=())
    with pytest.raises(TokenizerError, match="no tokenizer"):
        follow(None, constraint)
    with pytest.raises(aj.AlayaError, match=r"token 98, the 1\. of the text"):
        follow(tiny_model.tokenizer, constraint).accept(ord("b"))
    with pytest.raises(RequestError, match=r"constraint='a'.*aj\.Constraint"):
        aj.Greedy(constraint="a")


def test_without_llguidance_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **more):
        if name == "llguidance":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(RequestError, match=r"pip install alaya_jax\[grammar\]"):
        Constraint(regex="a")


def test_equal_ones_are_equal():
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    one, other = Constraint(json_schema=schema), Constraint(json_schema=json.dumps(schema))
    assert one == other
    assert hash(aj.Greedy(constraint=one)) == hash(aj.Greedy(constraint=other))
    assert json.loads(one.json_schema) == schema
    assert "constraint=" in repr(aj.Greedy(constraint=one))
