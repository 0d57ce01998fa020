"""Real servers, with calls and faults until every metric has been counted.

A single node, and a cluster of two edges with Postgres, Redis and NATS, on loopback in a temporary
directory.
"""

import os
import re
import resource
import signal
import subprocess
import time
import urllib.request
from pathlib import Path

TIMEOUT = 90


def until(what, done, seconds=TIMEOUT):
    """Polls until `done` returns a true value, and returns it."""
    end = time.monotonic() + seconds
    while not (found := done()):
        if time.monotonic() > end:
            raise SystemExit(f"check: not within {seconds} s: {what}")
        time.sleep(0.1)
    return found


class Server:
    """A qpq-server."""

    def __init__(self, bin, data, settings):
        variables = {
            "PATH": os.environ["PATH"],
            "RUST_LOG": "error",
            "QPQ_HTTP__LISTEN": "127.0.0.1:0",
            **settings,
        }
        self.log = open(data.with_suffix(".log"), "w+")
        # SIGXFSZ stays ignored, as in this program, so that a full disk is an error for the server
        # and does not kill it.
        self.process = subprocess.Popen(
            [bin / "qpq-server", "--listen", "127.0.0.1:0", "--data-dir", data],
            env=variables,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            restore_signals=False,
        )
        output = ""
        while " dm bob" not in output:
            line = self.process.stdout.readline()
            if not line:
                self.log.seek(0)
                raise SystemExit(f"check: qpq-server did not start: {output}{self.log.read()}")
            output += line
        self.address = re.search(r"listening on\s+(\S+)", output)[1]
        self.pin = re.search(r"fingerprint\s+(\S+)", output)[1]
        self.http = re.search(r"http://(\S+)/livez", output)[1]

    def series(self):
        """Returns every series: its name, and its labels with their values."""
        url = f"http://{self.http}/metrics"
        text = urllib.request.urlopen(url, timeout=30).read().decode()
        found = []
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name, labels = re.match(r"([\w:]+)(?:\{(.*)\})? \S+$", line).groups()
                pairs = re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels or "")
                found.append((name, dict(pairs)))
        return found

    def counted(self, name, **labels):
        return any(
            found == name and labels.items() <= given.items() for found, given in self.series()
        )


class Servers:
    """All servers, and their users."""

    def __init__(self, bin, work):
        self.bin, self.work, self.started = bin, work, []
        self.people = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in reversed(self.started):
            for child in children(process.pid):
                signal_to(child, signal.SIGCONT)
            process.send_signal(signal.SIGINT)
        for process in reversed(self.started):
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()

    def server(self, name, **settings):
        server = Server(self.bin, self.work / name, settings)
        self.started.append(server.process)
        return server

    def qpq(self, person, *words, server=None, ok=True, background=False):
        environment = {
            "PATH": os.environ["PATH"],
            "QPQ_HOME": str(self.work / "home"),
            "QPQ_PASSWORD": "a long password",
            "XDG_RUNTIME_DIR": str(self.work),
        }
        command = [self.bin / "qpq", "-p", person, *words]
        if server:
            command += ["--server", server.address, "--pin", server.pin]
        if background:
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            self.started.append(process)
            return process
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
        if ok and done.returncode:
            raise SystemExit(f"check: qpq {' '.join(words)}: {done.stdout}{done.stderr}")
        return done

    def chat(self, first, second, a, b):
        """Registers two users, who send messages to each other."""
        self.qpq(a, "register", a, server=first)
        self.qpq(b, "register", b, server=second)
        self.qpq(a, "send", b, "hello")
        self.qpq(b, "recv")
        self.qpq(b, "send", a, "hello yourself")
        self.qpq(a, "recv")

    def single_node(self):
        """Runs a single node until its disk is full."""
        server = self.server("single-node")
        self.chat(server, server, "ann", "ben")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        until("a write that fails", lambda: server.counted("qpq_store_errors_total"))
        return server

    def cluster(self):
        """Runs two edges, whose stores become unreachable one after the other."""
        services = subprocess.Popen([self.bin / "qpq-services"], stdout=subprocess.PIPE, text=True)
        self.started.append(services)
        postgres, redis, nats = (services.stdout.readline().strip() for _ in range(3))
        secrets = self.work / "secrets"
        init = [self.bin / "qpq-admin", "init", "--out", secrets]
        subprocess.run(init, check=True, stdout=subprocess.DEVNULL)
        settings = {
            "QPQ_POSTGRES__URL": postgres,
            "QPQ_REDIS__URL": redis,
            "QPQ_NATS__URL": nats,
            "QPQ_POSTGRES__TIMEOUT": "2s",
            "QPQ_REDIS__TIMEOUT": "1s",
            "QPQ_CLUSTER__POLL": "1s",
            "QPQ_CLUSTER__SECRETS_DIR": str(secrets),
            "QPQ_CLUSTER__MIGRATE": "at_start",
        }
        edges = [self.server(name, **settings) for name in ("edge-1", "edge-2")]
        self.chat(*edges, "alice", "bob")
        # qpq peeks and acks; the load generator also fetches.
        drain = [self.bin / "qpq-load", "run", "drain", "--server", edges[0].address]
        drain += ["--pin", edges[0].pin, "--rate", "5", "--seconds", "1"]
        drain += ["--connections", "1", "--accounts", "2"]
        subprocess.run(drain, check=True, stdout=subprocess.DEVNULL)
        programs = {name: pid for pid in children(services.pid) if (name := comm(pid))}
        waiting = self.qpq("bob", "recv", "--follow", background=True)
        until("a waiting reader", lambda: edges[1].counted("qpq_waiters"))
        self.qpq("alice", "send", "bob", "this wake arrives")
        received = lambda: edges[1].counted("qpq_wakes_total", way="received")
        until("a wake from another edge", received)
        self.without(programs["nats-server"], lambda: self.found_by_polling(edges))
        self.without(programs["redis-server"], lambda: until("Redis to fail", lambda: (
            self.try_to_send()
            and edges[0].counted("qpq_redis_errors_total")
            and edges[0].counted("qpq_limit_failures_total"))))
        # An operation whose connection has ended is retried on another one.
        until("a retried operation", lambda: (
            end_sessions(programs["postgres"])
            and self.try_to_send()
            and edges[0].counted("qpq_pg_retries_total")))
        end_sessions(programs["postgres"])
        self.without(programs["postgres"], lambda: until("Postgres to fail", lambda: (
            end_sessions(programs["postgres"]) and edges[0].counted("qpq_pg_errors_total"))))
        waiting.terminate()
        return edges

    def found_by_polling(self, edges):
        self.qpq("alice", "send", "bob", "this wake is lost")
        until("a message to be found", lambda: edges[1].counted("qpq_wakes_total", way="found"))

    def try_to_send(self):
        self.qpq("alice", "send", "bob", "perhaps", ok=False)
        return True

    def without(self, pid, work):
        """Calls `work` while a program is suspended."""
        os.kill(pid, signal.SIGSTOP)
        try:
            work()
        finally:
            os.kill(pid, signal.SIGCONT)


def signal_to(pid, what):
    try:
        os.kill(pid, what)
    except ProcessLookupError:
        pass


def children(pid):
    """Returns the child processes of a process."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except FileNotFoundError:
        return []


def comm(pid):
    return Path(f"/proc/{pid}/comm").read_text().strip()


def end_sessions(postmaster):
    """Ends the sessions of all clients in Postgres, as pg_terminate_backend does."""
    for backend in children(postmaster):
        try:
            if "127.0.0.1(" in Path(f"/proc/{backend}/cmdline").read_text():
                os.kill(backend, signal.SIGTERM)
        except (FileNotFoundError, ProcessLookupError):
            pass
    return True
