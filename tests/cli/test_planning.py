"""`alaya explain`, `plan` and `calibrate`, on a tiny random model."""

import json
import re

import pytest

from alaya_jax.optimizer.cost import Machine

MACHINE = Machine("paper", 1e10, 1e11, 1e10, 1e-4, 1e-4, 5e-6, 1e-6, 1e-9, 1e-6)


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr("alaya_jax.optimizer.situation.machine_for", lambda *_, **__: MACHINE)


@pytest.fixture
def document(tmp_path):
    file = tmp_path / "document.txt"
    file.write_text("The Senate shall meet on Monday. " * 40)
    return file


@pytest.fixture
def explain(alaya, tiny_model, document, tmp_path):
    fixed = ("explain", "--model", tiny_model, "--context", document, "--db", tmp_path / "db")

    def run(*arguments, **options):
        return alaya(*fixed, "--max-new-tokens", 3, *arguments, "When?", **options)

    return run


@pytest.mark.slow
def test_explain_shows_an_answer_in_every_form(explain, tmp_path):
    data = json.loads(explain("--json", "--attention", "topk:5@flat").stdout)
    analysis = data["analysis"]
    assert data["answer"]
    assert data["phases"]["decode"]["query"].startswith("TopK(k=5")
    assert analysis["position"] == data["tokens"][0] - 1
    visible = analysis["position"] + 1
    for layer, retrieved in zip(analysis["layers"], analysis["retrieved"], strict=True):
        # Fewer than the window holds where the context is short.
        assert layer["keys_attended"] == [min(640 + 5, visible)] * 4
        assert [len(at) for at in retrieved] == [n - 640 for n in layer["keys_attended"]]
        assert all(0 < x <= 1 + 1e-6 for x in layer["recovery"])
    shown = explain("--attention", "topk:5@flat")
    assert "beta needed" in shown.stdout
    assert "answer so far" in shown.stderr
    picture = tmp_path / "heads.png"
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        said = explain("--attention", "topk:5@flat", "--plot", picture, code=1).stderr
        assert "pip install 'alaya_jax[plot]'" in said
        assert not picture.exists()
    else:
        explain("--attention", "topk:5@flat", "--plot", picture)
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_explain_refuses_before_it_reads(explain, tmp_path):
    assert "no figure" in explain("--what", "colours", code=2).stderr
    assert "no attention policy" in explain("--attention", "most", code=2).stderr


def test_plan_before_anything_is_loaded(alaya, tiny_model):
    asked = ("plan", tiny_model, "--length", "4k")
    data = json.loads(alaya(*asked, "--json").stdout)
    assert data["length"] == 4096
    assert data["machine"]["device"] == "paper"
    assert len(data["layers"]) == 2
    kv = 2 * 2 * 2 * 16 * 4 * 4096
    assert data["bytes"]["kv"] == kv
    sketch = 256 * 2 * (16 * (16 // 2 + 4) + 2 * (16 + 2) + 4)
    assert data["bytes"]["indexes"] == 2 * sketch
    half = json.loads(alaya(*asked, "--dtype", "bfloat16", "--json").stdout)
    assert half["bytes"]["kv"] * 2 == kv
    assert half["bytes"]["weights"] * 2 == data["bytes"]["weights"]
    both = json.loads(alaya(*asked, "--batch", 2, "--json").stdout)
    assert both["bytes"]["kv"] == 2 * kv
    text = alaya(*asked).stdout
    for part in ("4,096 tokens", "Sketch(bits=4)", "against Full()", "alaya calibrate"):
        assert part in text
    tight = json.loads(alaya(*asked, "--memory", kv + sketch, "--json").stdout)
    assert [("Sketch" in x["plan"]) for x in tight["layers"]] == [False, True]
    # The database's budget: room for all tokens, and a page that belongs to nobody.
    page = (kv + 2 * sketch) // 256
    assert data["budget"] == tight["budget"] == 257 * page
    assert f"aj.Budget(device={257 * page}) (" in alaya(*asked).stderr
    small = alaya(*asked, "--memory", kv + sketch).stderr
    device, indexes = re.search(r"or in Budget\(device=(\d+), indexes=(\d+)\)", small).groups()
    assert (int(device), int(indexes)) == (kv + kv // 256 + sketch, sketch)
    assert "declares at most 8,000" in alaya("plan", tiny_model, "--length", "16k").stderr
    assert json.loads(alaya("plan", tiny_model, "--json").stdout)["length"] == 8000


def test_plan_of_a_known_architecture_without_any_file(alaya):
    data = json.loads(alaya("plan", "llama-3.1-8b", "--json").stdout)
    assert data["length"] == 131_072
    # All 8.03e9 parameters in bfloat16: also the embeddings, of which a token reads one row.
    assert data["bytes"]["weights"] == 2 * 8_030_261_248
    assert data["bytes"]["kv"] == 131_072 * 131_072


def test_plan_takes_a_length_beyond_the_declared_one(alaya, tiny_model):
    plain = alaya("plan", tiny_model, "--length", "16000", "--json")
    assert "declares at most 8,000" in plain.stderr
    longer = alaya("plan", tiny_model, "--length", "16000", "--rope", "yarn:2", "--json")
    assert "declares" not in longer.stderr
    assert json.loads(longer.stdout)["layers"]
    known = alaya("plan", "llama-3-8b", "--length", "16k", "--rope", "yarn:2", "--json")
    assert "declares" not in known.stderr


def test_plan_refuses_with_the_nearest_goals(alaya, tiny_model):
    said = alaya("plan", tiny_model, "--length", "4k", "--tpot", "1e-6", code=1).stderr
    assert "Nearest that can be had: tpot=" in said
    said = alaya("plan", tiny_model, "--memory", "1kB", code=1).stderr
    assert "raise device_memory" in said
    for bad in (("--length", "many"), ("--length", "0"), ("--dtype", "int4")):
        assert bad[0] in alaya("plan", tiny_model, *bad, code=2).stderr


@pytest.mark.slow
def test_calibrate_is_what_plan_goes_by(alaya, tiny_model, tmp_path, cache):
    text = tmp_path / "long.txt"
    text.write_text("".join(f"Section {i}. The Senate meets {i} times.\n" for i in range(120)))
    # A copy: other tests share the model's directory.
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_model.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    run = ("calibrate", "--model", model, "--length", "1400", "--queries", 2)
    data = json.loads(alaya(*run, "--json", text).stdout)
    assert data["lengths"] == [1400]
    assert data["path"].startswith(str(model))
    planned = json.loads(alaya("plan", model, "--length", "4k", "--json").stdout)
    assert f"calibrated on {sum(data['queries'])} queries at 1,400 tokens" in planned["basis"]
    other = json.loads(alaya("plan", tiny_model, "--length", "4k", "--json").stdout)
    assert "for want of a calibration" in other["basis"]
    assert "--machine" in alaya(*run, code=2).stderr
    said = alaya(*run, tmp_path / "none.txt", code=2).stderr
    assert "none.txt is not a file" in said
