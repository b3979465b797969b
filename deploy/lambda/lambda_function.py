"""TinyQueue as a function of AWS Lambda. docs/deploy.md has the steps.

`lambda_handler` answers the events of API Gateway, a function URL or a load balancer. At an event
of EventBridge it runs the jobs that are due until shortly before the function's time-out.
"""

from typing import Any

from apig_wsgi import make_lambda_handler
from tinyqueue.wsgi import app

SPARE = 6.0  # seconds that saving the last outcomes and deregistering may take

# All answers are text, so a REST API needs no list of binary media types.
answer = make_lambda_handler(app, non_binary_content_type_prefixes=("text/", "application/"))


def lambda_handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    if "source" in event and "detail-type" in event:
        return app.run_jobs(max(1.0, context.get_remaining_time_in_millis() / 1000 - SPARE))
    return answer(without_stage(event), context)


def without_stage(event: dict[str, Any]) -> dict[str, Any]:
    """Remove the stage, which an HTTP API puts before the path, from `rawPath`."""
    stage = event.get("requestContext", {}).get("stage", "$default")
    path = event.get("rawPath", "")
    if path == f"/{stage}" or path.startswith(f"/{stage}/"):
        return event | {"rawPath": path.removeprefix(f"/{stage}") or "/"}
    return event
