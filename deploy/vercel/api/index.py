"""TinyQueue as a function of Vercel. docs/deploy.md has the steps.

Vercel's cron jobs send GET requests, with the variable CRON_SECRET as the API key. GET /cron is
answered as POST /work.
"""

from collections.abc import Callable, Iterable
from typing import Any

from tinyqueue.wsgi import app as api


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    if (environ["REQUEST_METHOD"], environ.get("PATH_INFO")) == ("GET", "/cron"):
        environ = environ | {"REQUEST_METHOD": "POST", "PATH_INFO": "/work"}
    answer: Iterable[bytes] = api(environ, start_response)
    return answer
