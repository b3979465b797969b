"""The command line: the group of commands, and those that submit, inspect, manage, back up and plan.

worker.py adds the commands that start processes: `run`, `worker` and `web`. It is also the program
that has all commands. This module knows nothing of how jobs run.
"""

from __future__ import annotations

import codecs
import functools
import getpass
import json
import math
import os
import re
import signal
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from io import TextIOWrapper
from typing import Any, Literal

import click
import msgspec

import tinyqueue_schedule
from tinyqueue import (
    ENDED,
    HANDLERS,
    KEPT,
    SCANNED,
    STATUSES,
    Filter,
    InvalidJob,
    Job,
    NotReplicated,
    PastAttempt,
    Schedule,
    SettingsError,
    Status,
    TinyQueueError,
    Unavailable,
    UnknownType,
    WrongStatus,
    __version__,
    check_limit,
    check_name,
    host_name,
    read_override,
)
from tinyqueue_backup import Restored, back_up, restore as restore_file
from tinyqueue_config import Settings, error_line, load_handlers, open_queue, plural, set_up_logging
from tinyqueue_doctor import Finding, Observer, examine, local_workers
from tinyqueue_embedded import StartError, folder_of, local_redis
from tinyqueue_json import from_json, to_json
from tinyqueue_plan import BUSY, FULL, Load, Plan, make_plan
from tinyqueue_repair import repair
from tinyqueue_shards import AnyQueue
from tinyqueue_why import answer

# The group ------------------------------------------------------------------------------------------------------------

SECTIONS = {
    "Processes": ("web", "run", "worker", "redis"),
    "Submit jobs": ("enqueue",),
    "Inspect": ("stats", "workers", "list", "failed", "failures", "get", "log", "audit"),
    "Manage jobs": ("retry", "cancel", "hasten", "replay", "purge"),
    "Manage queues and workers": ("pause", "resume", "limits", "schedules", "quiet"),
    "Back up": ("backup", "restore"),
    "Diagnose": ("doctor", "check"),
    "Prepare": ("plan",),
}
LOG_EVERY = 1.0  # seconds between two reads of a log that is followed
WORDS = {"purged": "deleted", "skipped": "skipped (changed meanwhile)"}  # for the counts of bulk changes
WEB_TIMEOUT = 5.0  # seconds for a web process to answer /health
Command = Callable[..., None]


class Commands(click.Group):
    """The commands. A wrong setting, option or job exits with 2, and any other error with 1."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        is_run = not args or (args[0].startswith("-") and args[0] not in ("--help", "--version"))
        if is_run and not ctx.resilient_parsing:  # shell completion parses command lines that are not finished
            args = ["run", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        if isinstance(sys.stdout, TextIOWrapper):
            # A terminal with another encoding than UTF-8 gets escapes for what it cannot show.
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except (SettingsError, InvalidJob) as error:
            raise click.UsageError(str(error)) from None
        except TinyQueueError as error:
            raise click.ClickException(str(error)) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(100)) for name in names])
        with formatter.section("Options of run"):
            records = (option.get_help_record(ctx) for option in self.commands["run"].params)
            formatter.write_dl([record for record in records if record])


@click.group(
    cls=Commands,
    epilog="\b\n" + Settings.help(),
    options_metavar="",
    subcommand_metavar="[COMMAND] [ARGS]...",
    context_settings={"max_content_width": 120},
)
@click.version_option(__version__)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Run TinyQueue workers and manage jobs.

    Without a command, this runs a worker. For the options of a command, use COMMAND --help.
    """
    if ctx.invoked_subcommand != "web":  # `web` reads the settings itself, after its own options
        ctx.obj = Settings.read()


# What the commands share ----------------------------------------------------------------------------------------------


def require_queue(settings: Settings) -> AnyQueue:
    """Set up logging and open the queue. Raises SettingsError if no Redis is named."""
    if not settings.redis_url:
        raise SettingsError("REDIS_URL is not set; set it, or try TinyQueue with an embedded Redis: tinyqueue web")
    set_up_logging(settings)
    return open_queue(settings, settings.worker_connections)


def pass_queue(command: Command) -> Command:
    """Pass the queue that the settings name as the first argument of a command."""

    @click.pass_obj
    @functools.wraps(command)
    def with_queue(settings: Settings, /, *args: Any, **kwargs: Any) -> None:
        command(require_queue(settings), *args, **kwargs)

    return with_queue


def _require_job(job: Job | None, id: str) -> Job:
    if job is None:
        raise click.ClickException(f"no such job: {id}")
    return job


def _note(queue: AnyQueue, action: str, target: Mapping[str, Any], result: Mapping[str, Any] | None = None) -> None:
    """Add a change to the audit. If that fails, the change stays in effect."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError, ImportError):  # the user id has no name, as in some containers
        name = str(os.getuid())
    try:
        queue.note_action(f"{name}@{host_name()}", action, target, result or {})
    except TinyQueueError as error:
        click.echo(f"Warning: could not add this to the audit: {error}", err=True)


def _read_payload(payload: str) -> Any:
    try:
        return from_json(sys.stdin.buffer.read() if payload == "-" else payload.encode("utf-8", "surrogateescape"))
    except ValueError as error:
        raise click.UsageError(f"PAYLOAD is not JSON: {error}") from None


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
refresh_option = click.option("--watch", is_flag=True, help="Refresh every two seconds until Ctrl-C.")
limit_option = click.option(
    "--limit", type=click.IntRange(1, 1000), metavar="N", default=50, show_default=True, help="Maximum number to list."
)
yes_option = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")


def filter_options(*statuses: str, required: bool = False, default: str | None = None) -> Callable[[Command], Command]:
    """Add the options that select jobs, and pass them as `filter`. --status needs `statuses`."""

    def add(command: Command) -> Command:
        @functools.wraps(command)
        def with_filter(*args: Any, **options: Any) -> None:
            command(*args, filter=Filter(*(options.pop(field, None) for field in Filter._fields)), **options)

        options = [
            click.option("--type", metavar="TYPE", help="Only jobs of this type."),
            click.option("--queue", metavar="NAME", help="Only jobs in this queue."),
            click.option("--error-type", metavar="NAME", help="Only jobs whose last error has this type."),
            click.option("--tag", metavar="TAG", help="Only jobs with this tag."),
            click.option("--text", metavar="TEXT", help="Only jobs with this text in the JSON of their payload."),
        ]
        if statuses:
            about = partial(click.option, "--status", type=click.Choice(statuses), help="Only jobs with this status.")
            options.insert(0, about(required=required, show_default=default))
        return functools.reduce(lambda command, option: option(command), reversed(options), with_filter)

    return add


# Submit jobs ----------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("type")
@click.argument("payload")
@click.option("--max-attempts", type=int, metavar="N", help="Maximum number of attempts.  [default: the handler's]")
@click.option("--queue", metavar="NAME", help="Queue to submit to.  [default: the handler's]")
@click.option("--delay", type=float, metavar="SECONDS", help="Seconds to wait before the job may start.")
@click.option("--run-at", metavar="TIME", help="Earliest start time: ISO 8601 with a time zone.")
@click.option(
    "--expires-in",
    type=float,
    metavar="SECONDS",
    help="Seconds until the job expires. An expired job is not run; it fails when a worker takes it.",
)
@click.option("--unique-key", metavar="KEY", help="If a job with this key has not ended, print its id instead.")
@click.option("--after", multiple=True, metavar="ID", help="Start after this job has completed. Repeat it for several.")
@click.option(
    "--on-failure",
    type=click.Choice(["fail", "run"]),
    help="If a job in --after fails or is cancelled: fail too, or run anyway.  [default: fail]",
)
@click.option("--callback-url", metavar="URL", help="http or https URL that gets a webhook when the job has ended.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Tag of the job. Repeat it for several.")
@click.pass_obj
def enqueue(settings: Settings, /, type: str, payload: str, **options: Any) -> None:
    """Submit a job and print its id. PAYLOAD is JSON, or - to read it from standard input."""
    queue = require_queue(settings)
    load_handlers(settings.handlers)
    if type not in HANDLERS:
        raise UnknownType(type, sorted(HANDLERS))
    click.echo(queue.enqueue(type, _read_payload(payload), **options).id)


# Inspect --------------------------------------------------------------------------------------------------------------


@cli.command()
@refresh_option
@json_option
@click.pass_obj
def stats(settings: Settings, /, watch: bool, as_json: bool) -> None:
    """Say whether all is well, and count the jobs in each queue and status."""
    queue = require_queue(settings)
    observer = Observer(queue, settings.max_wait)

    def read() -> dict[str, Any]:
        return queue.stats() | {"verdict": observer.verdict()}

    _show(read, _print_stats, as_json, watch)


def _print_verdict(verdict: dict[str, Any]) -> None:
    if not verdict["problems"]:
        click.echo(verdict["text"])
    for problem in verdict["problems"]:
        todo = problem["next"]["text"] + (f": {command}" if (command := problem["next"].get("command")) else "")
        _print_safely(f"{problem['level']}: {problem['text']} (since {_format_time(problem['since'])})")
        _print_safely(f"  next: {todo}")
    click.echo()


def _print_stats(stats: dict[str, Any]) -> None:
    _print_verdict(stats["verdict"])
    rows = [["queue", "pending", "processing", "oldest waiting", ""]]
    for name, counts in {**stats["queues"], "all": stats | {"paused": False}}.items():
        oldest = f"{counts['oldestWaitingMs'] / 1000:,.1f} s" if counts["oldestWaitingMs"] else "-"
        rows.append([name, counts["pending"], counts["processing"], oldest, "paused" if counts["paused"] else ""])
    _print_table(rows)
    click.echo(f"\ndelayed (included in pending): {stats['delayed']}")
    click.echo(f"retrying (included in pending): {stats['retrying']}")
    click.echo(f"live workers: {stats['workers']}\n")
    ended = [[status, stats[status], stats["lastMinute"][status], stats["total"][status]] for status in ENDED]
    _print_table([["ended", "kept", "last minute", "total"], *ended])


@cli.command()
@refresh_option
@json_option
@pass_queue
def workers(queue: AnyQueue, watch: bool, as_json: bool) -> None:
    """List the workers and the jobs they run."""
    _show(queue.workers, _print_workers, as_json, watch)


def _print_workers(workers: list[dict[str, Any]]) -> None:
    rows = [["worker", "alive", "busy", "queues", "jobs"]]
    for worker in workers:
        busy = f"{len(worker['jobs'])}/{worker['concurrency']}"
        alive = ("quiet" if worker["quiet"] else "yes") if worker["alive"] else "no"
        rows.append([worker["id"], alive, busy, ",".join(worker["queues"]), " ".join(worker["jobs"])])
    _print_table(rows, empty="no workers; start one with: tinyqueue worker")
    now = time.time() * 1000
    running = [
        [worker["id"], slot["jobId"], slot["type"], f"{max(0, now - slot['startedAt']) / 1000:,.0f} s", state]
        for worker in workers
        for name, state in (("slots", ""), ("givenUp", "given up, and still runs"))
        for slot in worker[name]
    ]
    if running:
        click.echo()
        _print_table([["worker", "job", "type", "runs for", ""], *running])


@cli.command("list")
@filter_options(*STATUSES)
@limit_option
@click.option("--count", "counts", is_flag=True, help="Only print the number of all jobs that match.")
@json_option
@pass_queue
def list_jobs(queue: AnyQueue, filter: Filter, limit: int, counts: bool, as_json: bool) -> None:
    """List jobs, newest first."""
    if counts:
        click.echo(_count(queue, filter))
    else:
        _list(queue, filter, limit, as_json)


def _count(queue: AnyQueue, filter: Filter) -> int:
    return sum(step["count"] for step in _steps(partial(queue.count, filter)))


def _steps(step: Callable[[str], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Repeat a step, which looks at some jobs, until it has looked at all."""
    cursor: str | None = None
    while cursor != "":
        found = step(cursor or "")
        cursor = found["cursor"]
        yield found


@cli.command()
@filter_options()
@limit_option
@json_option
@pass_queue
def failed(queue: AnyQueue, filter: Filter, limit: int, as_json: bool) -> None:
    """List failed jobs, most recent failure first, with their errors."""
    _list(queue, filter._replace(status="failed"), limit, as_json)


@cli.command()
@filter_options()
@json_option
@pass_queue
def failures(queue: AnyQueue, filter: Filter, as_json: bool) -> None:
    """Group all failed jobs by type and error, those with the most jobs first."""
    filter = filter._replace(status="failed")
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    with click.progressbar(length=queue.stats()["failed"], label="failures", file=sys.stderr) as bar:
        for found in _steps(partial(queue.failures, filter)):
            for group in found["groups"]:
                own = groups.setdefault((group["type"], group["errorType"]), group | {"count": 0})
                own["count"] += group["count"]
            bar.update(SCANNED)
    listed = sorted(groups.values(), key=lambda group: -group["count"])
    if as_json:
        _print_json(listed)
        return
    rows = [["jobs", "type", "error", "last", "message of the last"]]
    for group in listed:
        at = _format_time(group["at"])
        rows.append([group["count"], group["type"], group["errorType"], at, " ".join(group["message"].split())[:100]])
    _print_table(rows, empty="no failed jobs")


@cli.command()
@limit_option
@json_option
@pass_queue
def audit(queue: AnyQueue, limit: int, as_json: bool) -> None:
    """List the latest actions of operators, over HTTP and with these commands."""
    actions = queue.audit(limit)
    if as_json:
        _print_json(actions)
        return
    rows = [["time", "by", "action", "on", "result"]]
    for entry in actions:
        [(kind, about)] = entry["target"].items()
        on = " ".join(f"{name}={value}" for name, value in about.items()) if kind == "filter" else f"{kind} {about}"
        result = " ".join(f"{name}={value}" for name, value in entry["result"].items())
        rows.append([_format_time(entry["at"]), entry["by"] or "-", entry["action"], on, result])
    _print_table(rows, empty="no actions yet")


def _list(queue: AnyQueue, filter: Filter, limit: int, as_json: bool) -> None:
    cut = None if as_json else 0  # a table shows neither payloads nor results
    jobs, cursor = queue.page(filter, limit=limit, cut=cut)
    while cursor and len(jobs) < limit:  # a page may hold fewer jobs than `limit`
        more, cursor = queue.page(filter, limit=limit - len(jobs), cursor=cursor, cut=cut)
        jobs += more
    if as_json:
        _print_json([job.answer() for job in jobs])
    else:
        _print_jobs(jobs)


def _print_jobs(jobs: Sequence[Job]) -> None:
    rows = [["time", "id", "type", "queue", "status", "attempts", "error"]]
    for job in jobs:
        when = _format_time(job.place()[0])
        attempts = f"{job.attempts}/{job.max_attempts}"
        rows.append([when, job.id, job.type, job.queue, job.status, attempts, error_line(job.error)[:100]])
    _print_table(rows, empty="no matching jobs")


@cli.command()
@click.argument("id")
@click.option("--watch", is_flag=True, help="Wait until the job has ended. Exit with 1 unless it completed.")
@json_option
@click.pass_context
def get(ctx: click.Context, id: str, watch: bool, as_json: bool) -> None:
    """Show a job, with its payload, result or error."""
    queue = require_queue(ctx.obj)
    job = _require_job(queue.get(id), id)
    last_line = ""
    while watch and job.status not in ENDED:
        line = f"{job.status}, attempt {job.attempts}/{job.max_attempts}, {job.progress:.0%}"
        if line != last_line:
            click.echo(line, err=True)
        last_line = line
        job = _require_job(queue.wait_for(id, 1.0), id)
    if as_json:
        _print_json(answer(queue, job))
    else:
        _print_job(answer(queue, job))
    ctx.exit(int(watch and job.status != "completed"))


def _print_job(fields: dict[str, Any]) -> None:
    payload = fields.pop("payload")
    error = fields.pop("error", None)
    history = fields.pop("history", ())
    if why := fields.pop("why", None):
        fields["why"] = f"it {why['text']}"
    for name, value in fields.items():
        shown = _format_time(value) if name.endswith("At") else to_json(value).decode() if name == "result" else value
        if name in ("after", "waitingFor", "tags"):
            shown = ", ".join(value)
        _print_safely(f"{name:<12} {shown}")
    _print_safely(f"payload\n{_format_json(payload)}")
    if history:
        _print_attempts(history)
    if error:
        _print_safely(f"error\n  {error_line(error)}\n{textwrap.indent(error.traceback, '  ')}".rstrip())


@cli.command()
@click.argument("id")
@click.option("--follow", is_flag=True, help="Show new lines until the job has ended.")
@json_option
@pass_queue
def log(queue: AnyQueue, id: str, follow: bool, as_json: bool) -> None:
    """Show what a job has logged, if its handler keeps logs."""
    after = 0
    while True:
        job, lines = queue.read_log(id, after)
        for line in lines:
            text = f"{_format_time(line.number // 1000)}  {line.attempt}  {line.level:<8} {line.text}"
            _print_safely(to_json(line.answer()).decode() if as_json else text)
        after = lines[-1].number if lines else after
        if not follow or _require_job(job, id).status in ENDED:
            if not _require_job(job, id).logged and not as_json:
                click.echo(f"job {id} has no log; only handlers with logs=True keep one", err=True)
            return
        time.sleep(LOG_EVERY)


def _print_attempts(history: Sequence[PastAttempt]) -> None:
    rows = [["attempts", "started", "after", "worker", "error"]]
    for attempt in history:
        seconds = f"{(attempt.ended_at - attempt.started_at) / 1000:,.1f} s" if attempt.ended_at else ""
        error = error_line(attempt.error)[:100]
        rows.append(["  " + attempt.outcome, _format_time(attempt.started_at), seconds, attempt.worker, error])
    _print_table(rows)


# Manage jobs and queues -----------------------------------------------------------------------------------------------


@cli.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@filter_options("failed", "cancelled", default="failed")
@click.option("--all", "every", is_flag=True, help="All failed jobs. Needed if no ID and no other option selects jobs.")
@click.option("--rate", type=click.IntRange(1, SCANNED), metavar="N", help="Requeue up to N jobs a second.")
@click.option("--most", type=click.IntRange(1), metavar="N", help="Requeue up to N jobs, the newest first.")
@pass_queue
def retry(queue: AnyQueue, ids: tuple[str, ...], filter: Filter, every: bool, **bounds: int | None) -> None:
    """Requeue failed or cancelled jobs with attempts reset, by ID or all that match the options.

    Ctrl-C stops after the current step, and prints how many jobs are left.
    """
    filter = _bulk_filter("failed", ids, filter, every)
    if ids and any(bounds.values()):
        raise click.UsageError("--rate and --most need options that select jobs (--all for all)")
    _change_each(queue, "retry", ids)
    if not ids:
        _run_in_steps(queue, "retry", filter, partial(queue.change_many, "retry", filter), **bounds)


@cli.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@filter_options()
@click.option(
    "--all", "every", is_flag=True, help="All pending jobs. Needed if no ID and no other option selects jobs."
)
@yes_option
@pass_queue
def cancel(queue: AnyQueue, ids: tuple[str, ...], filter: Filter, every: bool, yes: bool) -> None:
    """Cancel pending jobs, by ID or all that match. Running jobs given by ID are asked to stop."""
    filter = _bulk_filter("pending", ids, filter, every)
    _change_each(queue, "cancel", ids)
    if not ids:
        _confirm("Cancel", filter, yes)
        _run_in_steps(queue, "cancel", filter, partial(queue.change_many, "cancel", filter))


@cli.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@pass_queue
def hasten(queue: AnyQueue, ids: tuple[str, ...]) -> None:
    """Let delayed or retrying jobs start now, before the others of their queues."""
    _change_each(queue, "hasten", ids)


@cli.command()
@click.argument("id")
@click.argument("payload", required=False)
@click.pass_obj
def replay(settings: Settings, /, id: str, payload: str | None) -> None:
    """Submit an ended job again as a new job, and print its id.

    PAYLOAD replaces the payload: JSON, or - for standard input. The old job stays as it is.
    """
    queue = require_queue(settings)
    load_handlers(settings.handlers)
    job = _require_job(queue.get(id), id)
    if job.type not in HANDLERS:
        raise UnknownType(job.type, sorted(HANDLERS))
    try:
        new = queue.replay(id, **({} if payload is None else {"payload": _read_payload(payload)}))
    except NotReplicated as error:  # the job is stored
        _note(queue, "replay", {"job": id}, {"jobId": error.jobs[0].id})
        raise
    click.echo(_require_job(new, id).id)
    _note(queue, "replay", {"job": id}, {"jobId": new.id} if new else {})


@cli.command()
@click.argument("names", nargs=-1, required=True, metavar="QUEUE...")
@pass_queue
def pause(queue: AnyQueue, names: tuple[str, ...]) -> None:
    """Pause a queue: it still accepts jobs, but workers start none of them."""
    known = queue.queues()
    for name in [check_name("queue", name) for name in names]:
        queue.pause(name)
        _note(queue, "pause", {"queue": name})
        click.echo(f"{name} paused" + ("" if name in known else "; this queue has no jobs yet"))


@cli.command()
@click.argument("names", nargs=-1, required=True, metavar="QUEUE...")
@pass_queue
def resume(queue: AnyQueue, names: tuple[str, ...]) -> None:
    """Resume a paused queue: workers start its jobs."""
    for name in [check_name("queue", name) for name in names]:
        queue.resume(name)
        _note(queue, "resume", {"queue": name})
        click.echo(f"{name} resumed")


@cli.command()
@click.argument("names", nargs=-1, required=True, metavar="WORKER...")
@click.option("--resume", "resumes", is_flag=True, help="Let the workers take jobs again.")
@pass_queue
def quiet(queue: AnyQueue, names: tuple[str, ...], resumes: bool) -> None:
    """Make a worker quiet: it takes no more jobs, and finishes those that it has taken."""
    for name in names:
        if not (queue.resume_worker(name) if resumes else queue.quiet(name)):
            raise click.ClickException(f"no such worker: {name}; see tinyqueue workers")
        _note(queue, "resume" if resumes else "quiet", {"worker": name})
        click.echo(f"{name} {'resumed' if resumes else 'quiet'}")


@cli.command()
@click.argument("limit", required=False)
@click.option("--max-running", type=int, metavar="N", help="Maximum number of jobs that run at a time.")
@click.option("--rate", metavar="RATE", help="Maximum number of starts, as N/second, N/minute, N/hour or N/day.")
@click.option("--pause", "paused", is_flag=True, help="Start none of its jobs, until --reset or other numbers.")
@click.option("--reset", is_flag=True, help="Use the numbers in the code again.")
@json_option
@click.pass_obj
def limits(settings: Settings, /, limit: str | None, reset: bool, as_json: bool, **options: Any) -> None:
    """List the limits, or set the numbers of LIMIT, a type or type/value.

    Replaces everything that was set before: numbers that are left out return to those in the code.
    Takes effect on all workers within two seconds.
    """
    fields = {"maxRunning": options["max_running"], "rate": options["rate"], "paused": options["paused"] or None}
    wanted = {name: value for name, value in fields.items() if value is not None}
    if bool(wanted or reset) != bool(limit) or (wanted and reset):
        raise click.UsageError("to set a limit, name it and use --max-running, --rate or --pause, or --reset alone")
    queue = require_queue(settings)
    load_handlers(settings.handlers)
    if limit:
        queue.set_limit(check_limit(limit), read_override(limit, wanted))
        _note(queue, "set", {"limit": limit}, wanted)
        click.echo(f"{limit} reset" if reset else f"{limit} set")
        return
    _show(queue.limits_in_use, _print_limits, as_json, False)


def _print_limits(limits: dict[str, dict[str, Any]]) -> None:
    rows = [["limit", "running", "at most", "rate", "held", ""]]
    for name, about in limits.items():
        state = (
            "paused" if about["paused"] else f"halted for {about['haltedMs'] / 1000:.0f} s" if about["haltedMs"] else ""
        )
        most = about["maxRunning"] or "-"
        rows.append([name, about["running"], most, about["rate"] or "-", about["held"], state])
    _print_table(rows, empty="no limits; a handler declares one with max_running or rate")


@cli.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@filter_options(*ENDED)
@yes_option
@pass_queue
def purge(queue: AnyQueue, ids: tuple[str, ...], filter: Filter, yes: bool) -> None:
    """Delete ended jobs now, by ID or all that match (asks for confirmation)."""
    if bool(ids) == bool(filter.status) or (ids and filter != Filter()):
        raise click.UsageError("give either the IDs of jobs, or --status and other options that select jobs")
    _change_each(queue, "purge", ids)
    if not ids:
        _confirm("Delete", filter, yes)
        _run_in_steps(queue, "purge", filter, partial(queue.purge, filter))


@cli.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--pause", "verb", flag_value="pause", help="Pause these schedules.")
@click.option("--resume", "verb", flag_value="resume", help="Resume these schedules; missed ticks make no job.")
@click.option("--run", "verb", flag_value="run", help="Enqueue a job of each of these schedules now, and print its id.")
@click.option("--remove", "verb", flag_value="remove", help="Remove these schedules, unless code declares them.")
@refresh_option
@json_option
@pass_queue
def schedules(queue: AnyQueue, names: tuple[str, ...], verb: str | None, watch: bool, as_json: bool) -> None:
    """List schedules, all or those named, or change those named."""
    if not verb:
        _show(partial(_read_schedules, queue, names), _print_schedules, as_json, watch)
        return
    if not names:
        raise click.UsageError(f"--{verb} needs the NAME of a schedule")
    for name in names:
        done: Schedule | Job | None = getattr(tinyqueue_schedule, verb)(queue, check_name("name", name))
        if done is None:
            raise click.ClickException(f"no such schedule: {name}")
        _note(queue, verb, {"schedule": name}, {"jobId": done.id} if isinstance(done, Job) else {})
        click.echo(done.id if isinstance(done, Job) else f"{name} {verb.removesuffix('e')}ed")


def _read_schedules(queue: AnyQueue, names: Sequence[str]) -> list[dict[str, Any]]:
    now = queue.now()
    found = tinyqueue_schedule.list_schedules(queue)
    if missing := set(names) - {made.name for made, _ in found}:
        raise click.ClickException(f"no such schedule: {min(missing)}")
    return [made.answer(now, last) for made, last in found if not names or made.name in names]


def _print_schedules(schedules: Sequence[dict[str, Any]]) -> None:
    rows = [["schedule", "cron", "time zone", "type", "next run", "last run", "outcome", "from"]]
    for made in schedules:
        upcoming = _format_time(made["nextRuns"][0]) if made["nextRuns"] else "paused"
        run = made["lastRun"]
        last = _format_time(run["scheduledFor"]) if run else "-"
        outcome = (run["status"] or "deleted") if run else "-"
        if made["lastTick"] and made["lastTick"]["outcome"] != "enqueued":
            outcome += f" (last tick: {made['lastTick']['outcome']})"
        about = [made["name"], made["cron"], made["timezone"], made["type"]]
        rows.append([*about, upcoming, last, outcome, made["source"]])
    _print_table(rows, empty="no schedules; declare one in the handlers module, or use PUT /schedules/<name>")
    for made in schedules:
        for warning in made["warnings"]:
            click.echo(f"\n{made['name']}: {warning}")


def _bulk_filter(status: Status, ids: tuple[str, ...], filter: Filter, every: bool) -> Filter:
    """Fill in the status of a bulk change. Refuses to select no jobs, or by ids and by options."""
    if bool(ids) == (every or filter != Filter()):
        raise click.UsageError("give either the IDs of jobs or options that select jobs (--all for all)")
    return filter._replace(status=filter.status or status)


def _change_each(queue: AnyQueue, verb: Literal["cancel", "retry", "hasten", "purge"], ids: Sequence[str]) -> None:
    """Change jobs by id and print the result of each. Exit with 1 if one could not be changed."""
    change = {"cancel": queue.cancel, "retry": queue.retry, "hasten": queue.hasten, "purge": queue.purge_one}[verb]
    failed = 0
    for at, id in enumerate(ids):
        try:
            job = _require_job(change(id), id)
            _note(queue, "run" if verb == "hasten" else verb, {"job": id})
            requested = job.status == "processing" and job.cancel_requested
            status = "deleted" if verb == "purge" else job.status
            click.echo(f"{id} {'cancellation requested' if requested else status}")
        except (WrongStatus, click.ClickException) as error:
            failed += 1
            click.echo(f"Error: {error}", err=True)
        except Unavailable as error:
            rest = f"; stopped at {id}, not tried: {' '.join(ids[at + 1 :])}" if ids[at + 1 :] else ""
            raise click.ClickException(f"{error}{rest}") from None
    if failed:
        click.get_current_context().exit(1)


def _confirm(verb: str, filter: Filter, yes: bool) -> None:
    parts = {"of type": filter.type, "in queue": filter.queue, "with error": filter.error_type}
    parts |= {"with tag": filter.tag, "with payloads that have": filter.text}
    which = "".join(f" {words} {value}" for words, value in parts.items() if value)
    if not yes:
        click.confirm(f"{verb} all {filter.status} jobs{which}?", abort=True)


def _run_in_steps(
    queue: AnyQueue,
    verb: str,
    filter: Filter,
    step: Callable[[str, int], dict[str, Any]],
    *,
    rate: int | None = None,
    most: int | None = None,
) -> None:
    """Repeat a bulk change until it has looked at all jobs. Show progress, and print the counts.

    With a `rate`, takes one step a second. Ctrl-C stops between two steps. Then this prints how
    many jobs are left, and exits with 1.
    """
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    total: Counter[str] = Counter()
    about = {re.sub("_(.)", lambda match: match[1].upper(), name): v for name, v in filter._asdict().items() if v}
    bounded = bool(rate or most)
    left = most or math.inf
    length = min(left, _count(queue, filter)) if bounded else queue.stats()[str(filter.status)]
    with click.progressbar(length=int(length), label=verb, file=sys.stderr) as bar:
        cursor = ""
        while (cursor or not total) and left > 0 and not stop.is_set():
            began = time.monotonic()
            counts = step(cursor, int(min(left, rate or SCANNED)))
            cursor = counts.pop("cursor")
            total.update(counts)
            _note(queue, verb, {"filter": about}, counts)
            changed = sum(counts.values())
            left -= changed
            bar.update(changed if bounded else SCANNED)
            if rate and changed and cursor:
                stop.wait(began + 1 - time.monotonic())
    click.echo(", ".join(f"{count} {WORDS.get(word, word)}" for word, count in total.items()))
    if stop.is_set() and cursor:
        click.echo(f"stopped; {_count(queue, filter)} left")
        click.get_current_context().exit(1)


# The embedded Redis ---------------------------------------------------------------------------------------------------


@cli.command()
@click.pass_obj
def redis(settings: Settings, /) -> None:
    """Run the Redis of REDIS_URL=embedded:FOLDER until SIGTERM, under systemd for example."""
    if not settings.is_local:
        raise SettingsError("REDIS_URL names no folder; set it to embedded:FOLDER")
    set_up_logging(settings)
    try:
        local_redis(folder_of(settings.redis_url)).run()
    except ValueError as error:
        raise SettingsError(str(error)) from None
    except StartError as error:
        raise click.ClickException(str(error)) from None


# Back up and restore --------------------------------------------------------------------------------------------------

SHOWN_KINDS = 50  # pairs of queue and type
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _milliseconds(ctx: click.Context, option: click.Parameter, text: str | None) -> int:
    """Read a time such as 90s, 30m, 12h or 1d."""
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text or "0s")
    if not match or (text and not int(match[1])):
        raise click.BadParameter(f"{text!r} is not a time such as 90s, 30m, 12h or 1d")
    return int(match[1]) * SECONDS[match[2]] * 1000


@cli.command()
@click.argument("file")
@pass_queue
def backup(queue: AnyQueue, file: str) -> None:
    """Write all jobs except completed ones to FILE: plain, .gz or .zst; - is standard output."""
    with click.progressbar(length=0, label="backup", file=sys.stderr) as bar:
        counts = back_up(queue, file, bar)
    keys = plural(counts.get("once", 0), "idempotency key")
    click.echo(f"{plural(counts.get('job', 0), 'job')} and {keys} written to {file}", err=True)


@cli.command()
@click.argument("file")
@click.option("--merge", is_flag=True, help="Restore into a namespace that has jobs. Jobs that exist stay as they are.")
@click.option("--resume", "resumes", is_flag=True, help="Resume the queues at the end, except those paused in FILE.")
@click.option(
    "--skip-older-than",
    "oldest",
    callback=_milliseconds,
    metavar="TIME",
    help="Leave out jobs that have ended, or could have started, longer ago than this: 90s, 30m, 12h, 1d.",
)
@pass_queue
def restore(queue: AnyQueue, file: str, merge: bool, resumes: bool, oldest: int) -> None:
    """Restore the jobs of a backup with their ids, into paused queues. - is standard input."""
    with click.progressbar(length=0, label="restore", file=sys.stderr) as bar:
        restored = restore_file(queue, file, bar, merge=merge, oldest=oldest)
    _note(queue, "restore", {"file": file}, restored.stored)
    _print_restored(restored)
    names = restored.resumable
    for name in names if resumes else ():
        queue.resume(name)
    if names and resumes:
        click.echo(f"resumed: {' '.join(names)}")
    elif names:
        program = click.get_current_context().find_root().command_path
        program = f"python {program}" if program.endswith(".py") else program
        click.echo(f"these queues are paused; to run their jobs: {program} resume {' '.join(names)}")


def _print_restored(restored: Restored) -> None:
    by_status = ", ".join(f"{count} {status}" for status, count in sorted(restored.stored.items()))
    click.echo(f"{plural(restored.stored.total(), 'job')} restored" + (f": {by_status}" if by_status else ""))
    click.echo(f"{plural(restored.keys, 'idempotency key')} restored")
    if restored.schedules:
        click.echo(f"{plural(restored.schedules, 'schedule')} restored")
    if restored.limits:
        click.echo(f"the numbers set for {plural(restored.limits, 'limit')} restored")
    skipped = {
        "they exist already, or ended too long ago to be kept": restored.present,
        "they are older than --skip-older-than": restored.older,
        "other jobs have their uniqueKeys": len(restored.taken),
    }
    for why, count in skipped.items():
        if count:
            click.echo(f"{plural(count, 'job')} left out: {why}")
    if restored.taken:
        click.echo("  " + " ".join(restored.taken[:10]) + (" ..." if len(restored.taken) > 10 else ""))
    if restored.runs:
        kinds = sorted({(queue, type) for queue, type, _ in restored.runs})
        rows = [[*kind, restored.runs[*kind, True], restored.runs[*kind, False]] for kind in kinds[:SHOWN_KINDS]]
        click.echo("\nthese will run when their queues are resumed:\n")
        _print_table([["queue", "type", "due", "delayed"], *rows])
        click.echo(f"and {len(kinds) - SHOWN_KINDS} more kinds\n" if len(kinds) > SHOWN_KINDS else "")


# Diagnose -------------------------------------------------------------------------------------------------------------


@cli.command()
@click.option("--repair", "repairs", is_flag=True, help="First restore what lost keys have broken.")
@json_option
@click.pass_context
def doctor(ctx: click.Context, repairs: bool, as_json: bool) -> None:
    """Check Redis, permissions, settings and workers. Exits with 1 if a check fails."""
    settings: Settings = ctx.obj
    connections = settings.shards * (settings.web_concurrency * settings.web_connections + settings.worker_connections)
    queue = require_queue(settings)
    findings = repair(queue.parts) if repairs else []
    if repairs:
        _note(queue, "repair", {"namespace": settings.namespace}, {"repaired": len(findings)})
        findings = findings or [Finding("ok", "repair", "nothing to repair")]
    findings += examine(queue, connections)
    show = _print_json if as_json else _print_findings
    show(findings)
    ctx.exit(int(any(finding.level == "fail" for finding in findings)))


def _print_findings(findings: Sequence[Finding]) -> None:
    for finding in findings:
        advice = f" -> {finding.advice}" if finding.advice else ""
        click.echo(f"{finding.level:<5} {finding.about:<13} {finding.seen}{advice}")


@cli.command()
@click.option("--web", is_flag=True, help="Check the web process that HOST and PORT name instead.")
@click.option("--any", "either", is_flag=True, help="Check the web process first, and the workers if that fails.")
@click.pass_obj
def check(settings: Settings, web: bool, either: bool) -> None:
    """Check that the workers of this host renew their leases. Exits with 1 if one does not."""
    checks = [_check_web] if web else [_check_workers]
    if either:
        checks = [_check_web, _check_workers]
    problems = []
    for passes in checks:
        try:
            click.echo(passes(settings))
            return
        except (click.ClickException, TinyQueueError) as error:
            if not either:
                raise
            problems.append(str(error))
    raise click.ClickException("; ".join(problems))


def _check_workers(settings: Settings) -> str:
    workers = local_workers(require_queue(settings))
    if not workers:
        raise click.ClickException(f"no worker of this host ({host_name()}) is registered; start one")
    if lost := [about["id"] for about in workers if not about["alive"]]:
        raise click.ClickException(f"no heartbeat for {settings.lease} s: {' '.join(lost)}; restart the worker")
    return f"{plural(len(workers), 'worker')} with a lease: {' '.join(about['id'] for about in workers)}"


def _check_web(settings: Settings) -> str:
    """Ask a web process for /health, which needs neither Redis nor an API key."""
    from http.client import HTTPConnection, HTTPException  # slow to import, and no other command needs it

    host = "localhost" if settings.host in ("", "*") else settings.host
    connection = HTTPConnection(host, settings.port, timeout=WEB_TIMEOUT)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        raise click.ClickException(f"the web process on port {settings.port} does not answer: {error}") from None
    if status != HTTPStatus.OK:
        raise click.ClickException(f"the web process on port {settings.port} answers with {status}")
    return f"the web process on port {settings.port} answers"


# Prepare --------------------------------------------------------------------------------------------------------------

PERIODS = (3600, "h"), (60, "min")
CLIENTS = 10_000  # connections that Redis accepts by default


class _Number(click.FloatRange):
    """A range of floats that does not contain NaN."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        return self.fail(f"{value} is not a number", param, ctx) if math.isnan(number) else number


@cli.command()
@click.option("--rate", type=_Number(0.001, 1e6), required=True, metavar="N", help="Jobs a second, at the peak.")
@click.option("--duration", type=_Number(0.001, 1e6), required=True, metavar="SECONDS", help="How long a job runs.")
@click.option("--payload", type=click.IntRange(1, 1 << 24), required=True, metavar="BYTES", help="Size as JSON.")
@click.option("--result", type=click.IntRange(0, 1 << 18), default=100, metavar="BYTES", help="Size as JSON.  [100]")
@click.option("--failed", type=_Number(0, 100), default=1.0, metavar="PERCENT", help="Jobs that fail for good.  [1]")
@click.option("--outage", type=_Number(0, 1e6), default=3600.0, metavar="SECONDS", help="Outage of workers.  [3600]")
@click.option("--keys", is_flag=True, help="Every submit has an Idempotency-Key.")
@json_option
@click.pass_obj
def plan(settings: Settings, /, as_json: bool, **options: Any) -> None:
    """Compute the slots, workers, memory and connections that a load needs. Needs no Redis."""
    load = Load(**options)
    if load.payload > settings.max_body:
        raise SettingsError(f"--payload is above TINYQUEUE_MAX_BODY ({settings.max_body}); raise that, or send less")
    planned = make_plan(load, settings)
    if as_json:
        _print_json(planned)
    else:
        _print_plan(load, settings, planned)


def _print_plan(load: Load, settings: Settings, planned: Plan) -> None:
    used = f"{planned.busy_slots / planned.slots:.0%} busy; {BUSY:.0%} is the most that is planned"
    kept = f"completed {_period(settings.keep_completed)}, failed {_period(settings.keep_failed)}"
    each = " to each shard" if planned.shards > 1 else ""
    parts = ", ".join(f"{name} {_megabytes(size)}" for name, size in planned.memory.items() if size)
    lines = {
        "slots": f"{planned.slots:,}, {used}",
        "workers": f"{planned.workers:,}, with {plural(settings.worker_concurrency, 'slot')} each (WORKER_CONCURRENCY)",
        "web": f"{plural(planned.web_processes, 'process', 'processes')}; run one more to deploy without a gap",
        "backlog": f"{planned.backlog:,} jobs after {_period(load.outage)} without workers,"
        f" done {_period(planned.catch_up)} later",
        "Redis memory": f"maxmemory {_megabytes(planned.max_memory)}, {FULL:.0%} used at that time: {parts}",
        "kept": f"{kept}, at most {KEPT * planned.shards:,} of each",
        "Redis host": f"{_megabytes(2 * planned.max_memory)} of memory; Redis may need twice its own to save its data",
        "connections": f"{planned.connections:,}{each}; Redis accepts {CLIENTS:,} unless maxclients differs",
        "shards": f"{planned.shards:,}; one Redis serves {planned.jobs_per_redis:,} such jobs/s (TINYQUEUE_SHARDS)",
    }
    for name, text in lines.items():
        click.echo(f"{name:<13} {text}")
    click.echo("\nWhere these figures come from: docs/operations.md, Capacity")


def _megabytes(size: float) -> str:
    return f"{max(1, round(size / 1e6)):,} MB"


def _period(seconds: float) -> str:
    unit, name = next(((size, name) for size, name in PERIODS if seconds >= size), (1, "s"))
    return f"{seconds / unit:,.1f} {name}".replace(".0 ", " ")


# Output ---------------------------------------------------------------------------------------------------------------


def _show(read: Callable[[], Any], show: Callable[[Any], None], as_json: bool, watch: bool) -> None:
    """Show what `read` returns; with `watch`, again every two seconds until Ctrl-C."""
    show = _print_json if as_json else show
    if not watch:
        show(read())
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
    with suppress(KeyboardInterrupt):
        while True:
            show(read())
            time.sleep(2.0)
            click.clear()


def _print_table(rows: Sequence[Sequence[Any]], empty: str = "") -> None:
    """Print a header and rows with aligned columns, or `empty` if there is only the header."""
    if len(rows) == 1 and empty:
        click.echo(empty)
        return
    widths = [max(len(str(row[at])) for row in rows) for at in range(len(rows[0]))]
    for row in rows:
        cells = (
            str(cell).rjust(width) if isinstance(cell, int) else str(cell).ljust(width)
            for cell, width in zip(row, widths, strict=True)
        )
        _print_safely("  ".join(cells).rstrip())


def _print_safely(text: str) -> None:
    """Print text of clients and handlers; escape what could control the terminal."""
    click.echo("".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text))


def _format_time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _format_json(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def _print_json(value: Any) -> None:
    text = _format_json(value)
    if not _prints_unicode():  # JSON has its own escapes, which JSON parsers understand
        text = json.dumps(json.loads(text), indent=2)
    click.echo(text)


def _prints_unicode() -> bool:
    return codecs.lookup(sys.stdout.encoding or "utf-8").name.startswith("utf")
