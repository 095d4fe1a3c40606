"""What tokens say, and where that ends."""

from alaya_jax.runtime.output import Output
from alaya_jax.runtime.sampling.params import StopText


def said(tiny_model, text, stop=(), most=99, ends=()):
    output = Output(stop=StopText(stop))
    pieces = []
    for count, id in enumerate(text.encode(), start=1):
        output.open(tiny_model.tokenizer, 256)
        piece, reason = output.take(id, ends=id in ends, last=count == most)
        pieces.append(piece)
        if reason:
            return "".join(pieces), reason, output
    return "".join(pieces), None, output


def test_reasons(tiny_model):
    assert said(tiny_model, "abc")[:2] == ("abc", None)
    assert said(tiny_model, "abcd", most=3)[:2] == ("abc", "length")
    assert said(tiny_model, "abcd", ends=b"c")[:2] == ("ab", "eos")
    assert said(tiny_model, "abcdef", stop=("cd",))[:2] == ("ab", "stop")


def test_a_stop_string_comes_before_the_last_token(tiny_model):
    assert said(tiny_model, "abcd", stop=("cd",), most=4)[:2] == ("ab", "stop")
    assert said(tiny_model, "abcd", stop=("de",), most=4)[:2] == ("abcd", "length")


def test_what_follows_an_end_is_another_text(tiny_model):
    *_, output = said(tiny_model, "abcd", stop=("cd",))
    assert output.stream is None
    assert output.stop.stop == ()
    *_, output = said(tiny_model, "ab", most=2)
    assert output.stream is not None
    copied = output.copy()
    assert copied.stream is not output.stream


def test_without_a_tokenizer_there_is_no_text():
    output = Output()
    output.open(None, 256)
    assert output.take(65, ends=False, last=False) == ("", None)
    assert output.take(66, ends=False, last=True) == ("", "length")
