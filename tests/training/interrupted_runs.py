"""Run trainings in forked processes that interrupt themselves at a given moment.

Each line of the standard input is a job as JSON: `words` of a command line, the number of `processes`, and the `signal`
that process `rank` sends to itself at its event number `moment`, or process 0 after step `step` (0: never). The answer
is a line with the exit codes.
Events are the passes and updates of steps, validations, and the calls that write files, also in the background. At
SIGKILL, an interrupted write leaves half a file. With `limit`, process 0 can write only files of this size after step
`step`, instead of sending a signal. A state is saved after `every` steps.

Paddle is imported once. The processes are forked from a process that has not computed anything with Paddle.
"""

import functools
import itertools
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback

from fcvit.cli import main
from fcvit.processes import join
from fcvit.training import log, loop
from fcvit.training.step import Trainer
from fcvit.weights import safetensors_file

log.training_curves = lambda *_: b""  # drawing is slow


def run_here(job, rank):
    """Run the command line in this process, which ends with the exit code of the command."""
    events, step_file = itertools.count(1), None
    if job["rank"] == rank and job["moment"]:

        def event(interrupted=lambda: None):
            if next(events) == job["moment"]:
                interrupted()
                os.kill(os.getpid(), job["signal"])

        for owner, name in ((Trainer, "_losses"), (Trainer, "_update"), (loop, "evaluate_split"), (os, "replace"),
                            (os, "link"), (os, "fsync")):  # fmt: skip
            setattr(owner, name, after(event, getattr(owner, name)))
        write = safetensors_file.write

        def half_written(path, *given):
            event(lambda: path.write_bytes(b"\xff\0\0\0\0\0\0\0{"))
            write(path, *given)

        safetensors_file.write = half_written
    requests = loop.Loop._requests

    def due(one_loop, interrupted):
        return requests(one_loop, interrupted) | {"save": float(one_loop.trainer.step % job["every"] == 0)}

    loop.Loop._requests = due
    if rank == 0:
        update = Trainer._update
        step_file = os.open(job["steps"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

        def recorded(trainer, *given):
            result = update(trainer, *given)
            os.pwrite(step_file, b"%08d" % trainer.step, 0)
            if trainer.step == job["step"] and job["limit"]:
                resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
            elif trainer.step == job["step"]:
                os.kill(os.getpid(), job["signal"])
            return result

        Trainer._update = recorded
    code = main(job["words"])
    join().leave()  # as at the normal end of a program
    os._exit(code or 0)


def after(event, function):
    @functools.wraps(function)
    def wrapped(*given, **named):
        event()
        return function(*given, **named)

    return wrapped


def start(job, rank, ports):
    """Fork a process for the job."""
    if child := os.fork():
        return child
    try:
        output = os.open(f"{job['log']}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if len(ports) > 1:
            hosts = [f"127.0.0.1:{port}" for port in ports[1:]]
            os.environ |= {"PADDLE_TRAINERS_NUM": str(len(hosts)), "PADDLE_TRAINER_ID": str(rank)}
            os.environ |= {"PADDLE_TRAINER_ENDPOINTS": ",".join(hosts), "PADDLE_CURRENT_ENDPOINT": hosts[rank]}
            os.environ |= {"PADDLE_DISTRI_BACKEND": "gloo"}
            os.environ |= {"PADDLE_MASTER": f"127.0.0.1:{ports[0]}", "PADDLE_LOCAL_SIZE": str(len(hosts))}
        run_here(job, rank)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(99)


def run(job):
    """Return the exit codes of the processes. After one has failed, end the others, as Paddle's launcher does."""
    count = job["processes"]
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count + 1 if count > 1 else 0)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    children = [start(job, rank, ports or [0]) for rank in range(count)]
    codes, deadline, ending = {}, time.monotonic() + 60, False
    while len(codes) < count:
        for child in set(children) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) and not ending:
            ending, deadline = True, time.monotonic() + 10
            signal_all(set(children) - codes.keys(), signal.SIGTERM)
        if time.monotonic() > deadline:
            signal_all(set(children) - codes.keys(), signal.SIGKILL)
        time.sleep(0.01)
    return [codes[child] for child in children]


def signal_all(children, number):
    for child in children:
        os.kill(child, number)


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
