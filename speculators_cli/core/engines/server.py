"""Server: JSON requests to an HTTP server, with retries."""

import json
import time
from collections.abc import Callable, Mapping
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from speculators_cli.core.errors import MachineError, SettingsError

T = TypeVar("T")

NUM_RETRIES = 3
TOO_MANY_REQUESTS, SERVER_ERROR = 429, 500
MAX_REASON = 300  # characters of a server's own message


class Server:
    """A server that is sent JSON and returns JSON objects.

    Args:
        url: Its address, with or without `/v1`.
        flag: The flag that the address was passed with.
        api_key: Sent as a bearer token.
        backoff_seconds: Before the first of three retries; doubled before each further one.

    Raises:
        SettingsError: The address cannot be used.
    """

    def __init__(self, url: str, *, flag: str, api_key: str | None, backoff_seconds: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(
                f"`{flag}`: `{url}` is not an HTTP address",
                hint="Pass the address of a server, such as `http://localhost:8000`",
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self._flag = flag
        self._backoff_seconds = backoff_seconds
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def ask(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        seconds: float,
        num_retries: int = NUM_RETRIES,
    ) -> dict[str, Any]:
        """Send a request, and again if the connection fails or the server is unable to answer.

        Args:
            path: Below the address.
            body: Sent by POST; without, the request is a GET.
            seconds: Maximum duration of one request.
            num_retries: How often it is sent again.

        Raises:
            MachineError: It fails each time, or its reply cannot be used.
        """
        return self._fetch(path, body, _parse_object, seconds=seconds, num_retries=num_retries)

    def fetch_text(self, path: str, *, seconds: float) -> str:
        """Send a GET request whose reply is text, such as metrics; otherwise like `ask`."""
        return self._fetch(path, None, bytes.decode, seconds=seconds, num_retries=NUM_RETRIES)

    def _fetch(
        self,
        path: str,
        body: Mapping[str, Any] | None,
        parse: Callable[[bytes], T],
        *,
        seconds: float,
        num_retries: int,
    ) -> T:
        for trial in range(num_retries + 1):
            if trial:
                time.sleep(self._backoff_seconds * 2 ** (trial - 1))
            try:
                return parse(self._ask_once(path, body, seconds))
            except HTTPError as error:
                with error:
                    reason = f"status {error.code}, {_message(error)}"
                if error.code < SERVER_ERROR and error.code != TOO_MANY_REQUESTS:
                    break
            except (OSError, HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            except ValueError as error:
                reason = str(error)
                break
        times = f" ({trial + 1} times)" if trial else ""
        raise MachineError(
            f"`{self.url}{path}` fails{times}: {reason}",
            hint=f"Check that the server of `{self._flag}` runs, and read its log",
        )

    def _ask_once(self, path: str, body: Mapping[str, Any] | None, seconds: float) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        # The scheme is checked: a file cannot be opened.
        request = Request(self.url + path, data, self._headers)  # noqa: S310
        with urlopen(request, timeout=seconds) as response:  # noqa: S310
            content: bytes = response.read()
        return content


def _parse_object(text: bytes) -> dict[str, Any]:
    try:
        reply = json.loads(text)
    except ValueError:
        raise ValueError("the reply is not JSON") from None
    if not isinstance(reply, dict):
        raise ValueError("the reply is not a JSON object")
    return reply


def _message(error: HTTPError) -> str:
    """Return a server's own message."""
    text = error.read(64 * 1024).decode("utf-8", "replace") or str(error.reason)
    try:
        content = json.loads(text)
    except ValueError:
        content = text
    if isinstance(content, dict):
        content = content.get("error", content)
    if isinstance(content, dict):
        content = content.get("message", content)
    return " ".join(str(content).split())[:MAX_REASON]
