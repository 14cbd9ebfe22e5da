"""Restrictions on the web pages that may use a server: checks of `Host`, `Origin` and `Sec-Fetch-Site`, and CORS headers.

A browser lets any page send requests to a server on the user's own machine. Two headers identify such requests:

- `Host` is the host name in the URL. A page whose own name was made to resolve to this machine (DNS rebinding) sends that name,
  so only known names are accepted. IP addresses and localhost cannot be rebound and are always accepted, as are requests
  without `Host` (HTTP/1.0 health checks). A server with an API key accepts any name, because such a page lacks the key.
- `Origin` and `Sec-Fetch-Site` identify the origin of the page, and scripts cannot change them. Requests from pages of another
  origin are rejected unless that origin is allowed, with or without a key. Following a link to this server is allowed. Clients
  other than browsers send neither header.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatchcase

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from slideredit_rt.serving.faults import Fault
from slideredit_rt.serving.settings import host_pattern, is_address, web_origin

_LOCAL = ("localhost", "*.localhost")
_HOST_HEADER = re.compile(r"(\[[^]]*\]|[^:]*)(?::\d*)?")


class Guard:
    """Middleware that answers 403 to requests for an unknown host name or from pages of a foreign origin.

    Args:
        app: The application behind it.
        hosts: Accepted host names, as `host_pattern` returns them; `*` for any.
        origins: Allowed origins, as `web_origin` returns them.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], origins: Collection[str]) -> None:
        self.app = app
        self._hosts = (*_LOCAL, *hosts)
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fault = self._fault(scope["method"], Headers(scope=scope)) if scope["type"] == "http" else None
        app = self.app if fault is None else JSONResponse(fault.body, fault.status, fault.headers)
        await app(scope, receive, send)

    def _fault(self, method: str, headers: Headers) -> Fault | None:
        host, origin = headers.get("host", "").strip().lower(), headers.get("origin")
        if not self._knows(host):
            message = f"{host[:80]!r} is not a known name of this server; use its IP address, or start it with --allowed-host"
            return Fault(403, message, code="host_not_allowed")
        if self._is_foreign(method, headers, host, origin):
            page = "another site" if origin is None else repr(origin[:80])
            message = f"web pages of {page} may not use this server; start it with --allow-origin to allow them"
            return Fault(403, message, code="origin_not_allowed")
        return None

    def _knows(self, host: str) -> bool:
        found = _HOST_HEADER.fullmatch(host)
        name = "" if found is None else found[1].removesuffix(".")
        known = is_address(name.strip("[]")) or any(fnmatchcase(name, pattern) for pattern in self._hosts)
        return known or not host

    def _is_foreign(self, method: str, headers: Headers, host: str, origin: str | None) -> bool:
        if not self._origins.isdisjoint(("*", origin)):
            return False
        site = headers.get("sec-fetch-site")
        if site is None:
            # Older browsers leave this header out, and so do all for pages loaded without HTTPS from another machine.
            return origin is not None and origin.partition("://")[2].lower() != host
        # The browser compared origins by its own URL, which is more reliable than Host behind a proxy.
        followed_link = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        return site not in ("same-origin", "none") and not followed_link


def guards(hosts: Collection[str], origins: Collection[str]) -> list[Middleware]:
    """Return the middlewares for these hosts and origins, outermost first.

    Args:
        hosts: Names of the server besides IP addresses and localhost; see `host_pattern`.
        origins: Origins whose pages may send requests and read the responses; see `web_origin`.

    Raises:
        SliderEditError: A host name or an origin is malformed.
    """
    origins = tuple(map(web_origin, origins))
    guard = Middleware(Guard, hosts=tuple(map(host_pattern, hosts)), origins=origins)
    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=("*",),
        expose_headers=("Retry-After",),
        allow_private_network=True,
    )
    return [guard, cors] if origins else [guard]
