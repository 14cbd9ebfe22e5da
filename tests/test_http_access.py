"""Who may use the HTTP API: the key, the names of the server, and the pages of other sites."""

from typing import Any

import httpx
import openai
import pytest
from http_server import RED, edit, listening, raw, refused

from slideredit_rt.serving.app import create_app
from slideredit_rt.serving.service import EditService


def test_only_the_right_key_opens(service: EditService, png: bytes) -> None:
    with (
        listening(create_app(service, model="shapes", api_key="s3cret"), service) as (address, _),
        httpx.Client(base_url=address, timeout=30) as client,
    ):
        for key in (None, "Bearer wrong", b"Bearer \xff\xfe", "s3cret", "Basic s3cret"):
            headers: dict[str, Any] = {} if key is None else {"Authorization": key}
            for answer in (client.get("/v1/models", headers=headers), client.post("/v1/images/edits", headers=headers)):
                refused(answer, 401, "invalid_api_key", "Authorization: Bearer")
                assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/v2/health/ready", "/metrics", "/"):
            assert client.get(path).status_code == 200
        client.headers["Authorization"] = "Bearer s3cret"
        assert edit(client, png, prompt=RED).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong").models.list()


# Names and other sites.


NAMES = ["localhost:8000", "LocalHost.", "app.localhost", "127.0.0.1:1", "[::1]:8000", "[2001:db8::1]", "10.1.2.3", ""]


@pytest.mark.parametrize("host", NAMES)
def test_local_names_and_addresses_are_answered(client: httpx.Client, host: str) -> None:
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "[::1", "::1", "a@localhost"]
)
@pytest.mark.parametrize("path", ["/", "/v1/models", "/metrics"])
def test_a_name_that_was_made_to_resolve_here_is_refused(client: httpx.Client, host: str, path: str) -> None:
    sentence = "is not a known name of this server; use its IP address, or start it with --allowed-host"
    refused(client.get(path, headers={"host": host}), 403, "host_not_allowed", sentence)


def test_a_health_check_without_host_is_answered(client: httpx.Client, url: str) -> None:
    with raw(url, b"GET /health HTTP/1.0\r\n\r\n") as connection:
        assert connection.recv(10_000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:3000", "sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
        {"origin": "https://evil.example", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
    ],
)
def test_pages_of_other_sites_are_refused(
    client: httpx.Client, service: EditService, png: bytes, headers: dict[str, str]
) -> None:
    before = service.stats().outcomes
    form: dict[str, Any] = {"files": {"image": png}, "data": {"prompt": RED, "num_inference_steps": 1}, "headers": headers}
    refused(client.post("/v1/images/edits", **form), 403, "origin_not_allowed", "start it with --allow-origin to allow them")
    assert service.stats().outcomes == before
    preflight = client.options("/v1/images/edits", headers=headers | {"access-control-request-method": "POST"})
    refused(preflight, 403, "origin_not_allowed", "may not use this server")
    assert not [name for name in preflight.headers if name.startswith("access-control")]


def test_the_servers_own_pages_and_links_to_them_are_answered(client: httpx.Client, url: str, png: bytes) -> None:
    for headers in (
        {"origin": url},
        {"origin": url.upper(), "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"},
        # Through a proxy that puts its own name into Host.
        {"origin": "https://images.example.com", "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
    ):
        form: dict[str, Any] = {"files": {"image": png}, "data": {"prompt": RED, "num_inference_steps": 1}, "headers": headers}
        assert client.post("/v1/images/edits", **form).status_code == 200, headers
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/", headers=link).status_code == 200


def test_what_is_allowed_is_answered_with_what_browsers_ask_for(service: EditService, png: bytes) -> None:
    hosts, origins = ("GPU-Box.", "*.example.com"), ("HTTPS://App.Example.org:443", "null")
    app = create_app(service, model="shapes", api_key="s3cret", allowed_origins=origins)
    with listening(app, service) as (address, _), httpx.Client(base_url=address, timeout=30) as client:
        # The key does what the names would.
        assert client.get("/health", headers={"host": "anything.example"}).status_code == 200
        for origin in ("https://app.example.org", "null"):
            asked = {"origin": origin, "sec-fetch-site": "cross-site", "access-control-request-method": "POST"}
            asked |= {"access-control-request-headers": "authorization, x-stainless-lang"}
            preflight = client.options("/v1/images/edits", headers=asked | {"access-control-request-private-network": "true"})
            assert preflight.status_code == 200
            assert preflight.headers["access-control-allow-origin"] == origin
            assert "POST" in preflight.headers["access-control-allow-methods"]
            assert preflight.headers["access-control-allow-headers"] == "authorization, x-stainless-lang"
            assert preflight.headers["access-control-allow-private-network"] == "true"
            for key, status in (("s3cret", 200), ("wrong", 401)):  # a page may read why it was refused
                headers = {"origin": origin, "sec-fetch-site": "cross-site", "authorization": f"Bearer {key}"}
                answer = client.post("/v1/images/edits", files={"image": png}, data={"prompt": RED}, headers=headers)
                assert answer.status_code == status
                assert answer.headers["access-control-allow-origin"] == origin
                assert "Origin" in answer.headers["vary"]
        headers = {"origin": "https://evil.example", "authorization": "Bearer s3cret"}
        refused(
            client.get("/v1/models", headers=headers),
            403,
            "origin_not_allowed",
            "'https://evil.example' may not use this server",
        )
    app = create_app(service, model="shapes", allowed_hosts=hosts, allowed_origins=["*"])
    with listening(app, service) as (address, _), httpx.Client(base_url=address, timeout=30) as client:
        for host, status in (("gpu-box:80", 200), ("a.example.com", 200), ("example.com", 403)):
            assert client.get("/v1/models", headers={"host": host}).status_code == status
        answer = client.get("/v1/models", headers={"origin": "https://any.example"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")
