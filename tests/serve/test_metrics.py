"""Numbers for Prometheus add up to what was asked."""

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from .conftest import HELLO


def numbers(client) -> dict[str, float]:
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = ",".join(sample.labels.values())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_numbers_add_up(client):
    def ask(**body: Any) -> dict[str, Any]:
        asked = {"messages": HELLO, "max_tokens": 6, "temperature": 0, "ignore_eos": True} | body
        return client.post("/v1/chat/completions", json=asked).json()["usage"]

    before = numbers(client)
    first, second = ask(), ask(n=2)
    after = numbers(client)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown("alaya_generation_tokens_total") == 18
    assert grown("alaya_engine_tokens_generated_total") == 18
    assert grown("alaya_prompt_tokens_total") == 3 * first["prompt_tokens"]
    assert grown("alaya_request_success_total{length}") == 3
    assert grown("alaya_time_to_first_token_seconds_count") == 3
    assert grown("alaya_inter_token_latency_seconds_count") == 15
    assert grown("alaya_request_time_per_output_token_seconds_count") == 3
    assert grown("alaya_request_queue_time_seconds_count") == 3
    whole = grown("alaya_e2e_request_latency_seconds_sum")
    parts = grown("alaya_time_to_first_token_seconds_sum")
    parts += grown("alaya_inter_token_latency_seconds_sum")
    assert abs(whole - parts) < 1e-6
    assert grown("alaya_keys_read_count") == 3
    assert after["alaya_num_requests_running"] == 0
    assert 0 <= after["alaya_kv_cache_usage_perc"] <= 1
    assert second["completion_tokens"] == 12
