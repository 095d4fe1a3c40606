"""The page for people loads nothing from anywhere, and asks only what is there."""

import re

from alaya_jax.serve import page


def test_the_page_is_served_whole(client):
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.text == page.html()
    assert not re.search(r"https?:|//cdn|<script src|<link|@import|innerHTML|eval\(", answer.text)


def test_the_page_asks_what_is_there(client):
    paths = set(re.findall(r'["(](/[a-z][a-z0-9/]*)/?"', page.html()))
    assert {"/v1/chat/completions", "/v1/contexts", "/v1/requests", "/v1/models"} <= paths
    routes = {route.path for route in client.app.routes}
    assert {path.rstrip("/") for path in paths} <= routes


def test_ids_that_the_script_looks_up_are_in_the_page():
    looked = set(re.findall(r'\$\("(\w+)"\)', page.html()))
    assert looked <= set(re.findall(r'id="(\w+)"', page.html()))
