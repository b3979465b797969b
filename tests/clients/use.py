"""Use the generated Python client against the server whose URL is the first argument.

Prints "ok" if the client submits the README's job, waits for it and reads a problem.
"""

import sys

from tiny_queue_client import Client
from tiny_queue_client.api.inspect import get_job, list_jobs
from tiny_queue_client.api.manage import cancel_job
from tiny_queue_client.api.submit import submit_job, submit_jobs
from tiny_queue_client.models import Brief, Briefs, Problem, SendEmailJob, SendEmailJobType, SendEmailPayload, StoredJob
from tiny_queue_client.models.list_jobs_response_200 import ListJobsResponse200

client = Client(base_url=sys.argv[1], raise_on_unexpected_status=True)
job = SendEmailJob(
    type_=SendEmailJobType.SEND_EMAIL, payload=SendEmailPayload(to="user@example.com", subject="Hello", body="Hi")
)
submitted = submit_job.sync(client=client, body=job, idempotency_key="one")
assert isinstance(submitted, Brief), submitted
ended = get_job.sync(submitted.job_id, client=client, wait=20)
assert isinstance(ended, StoredJob), ended
assert ended.status.value == "completed"
delayed = submit_job.sync(client=client, body=SendEmailJob(type_=job.type_, payload=job.payload, delay=60))
assert isinstance(delayed, Brief), delayed
cancelled = cancel_job.sync(delayed.job_id, client=client)
assert isinstance(cancelled, Brief), cancelled
assert cancelled.status.value == "cancelled"
both = submit_jobs.sync(client=client, body=[job, job])
assert isinstance(both, Briefs), both
page = list_jobs.sync(client=client, limit=2)
assert isinstance(page, ListJobsResponse200), page
assert len(page.jobs) == 2
job.payload.subject = "two\nlines"
refused = submit_job.sync(client=client, body=job)
assert isinstance(refused, Problem), refused
assert refused.field == "payload"
print("ok")
