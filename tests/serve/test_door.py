"""Ids, the key, and errors of what is no route's."""


def test_paths_and_methods_that_are_not_there(client):
    for answer, status in ((client.get("/v1/nothing"), 404), (client.get("/tokenize"), 405)):
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_request_has_an_id(client):
    first = client.get("/version")
    assert len(first.headers["x-request-id"]) == 32
    mine = client.get("/version", headers={"X-Request-Id": "mine-1"})
    assert mine.headers["x-request-id"] == "mine-1"
    odd = client.get("/version", headers={"X-Request-Id": "a b"})
    assert odd.headers["x-request-id"] != "a b"


def test_a_key_is_asked_for(opened):
    closed = opened(api_key="secret")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        for path in ("/v1/models", "/metrics", "/v1/contexts", "/tokenizer_info"):
            answer = closed.get(path, headers=headers)
            assert answer.status_code == 401, path
            assert answer.json()["error"]["code"] == "invalid_api_key"
    assert closed.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
    assert closed.get("/health").status_code == 200
    assert closed.get("/").status_code == 200
    other = opened(api_key="clé")
    key = {"Authorization": "Bearer clé".encode()}
    assert other.get("/v1/models", headers=key).status_code == 200


def test_a_server_for_this_machine_is_called_by_no_other_name(opened):
    """Else a page that its owner leads here (DNS rebinding) could read what is stored."""
    local = opened(hosts=frozenset({"localhost", "127.0.0.1"}))
    for host, status in (("localhost:8000", 200), ("127.0.0.1", 200), ("evil.example:8000", 403)):
        answer = local.get("/health", headers={"Host": host})
        assert answer.status_code == status
    assert "evil.example" in answer.json()["error"]["message"]
