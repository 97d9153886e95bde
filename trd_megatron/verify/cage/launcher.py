"""Started by the grader, one for each of its workers: builds the cage around itself, then forks a process tree for each program.

Run as a script: `python -P -s -S launcher.py PARENT`, with a socket to the grader as descriptor 0. First message: the plan of the jail
(jail.Jail), answered by {"ready": true} or {"refused": why}. Then, for each program, {"op": "program", "memory_bytes", "cpu_s"},
answered by {"open": true}, after which the program's own supervisor answers (supervisor.serve) until {"op": "end"}; when its tree is
gone we say {"closed": true}.
"""

import os
import signal
import sys
import traceback

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import frames
import jail
import runner
import supervisor

LINK = 0


def main() -> None:
    grader = int(sys.argv[1])
    jail.die_with(grader)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # Ctrl-C is for the grader, which then closes the link
        signal.signal(number, signal.SIG_IGN)
    link = os.dup(LINK)
    first = frames.receive(link)
    if first is None:
        return
    if first[0]["processor"] is not None:
        os.sched_setaffinity(0, {first[0]["processor"]})
    walls = jail.Jail(first[0])
    try:
        walls.build()
        jail.die_with(grader)  # again: the kernel forgets it where credentials change
        null = os.open("/dev/null", os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        runner.prepare(first[0]["paths"], first[0]["executable"])
    except (jail.Refused, OSError) as error:
        frames.send(link, {"refused": str(error)})
        return
    except Exception:
        frames.send(link, {"broken": traceback.format_exc(limit=-3)})
        return
    frames.send(link, {"ready": True})
    while (message := frames.receive(link)) is not None:
        order = message[0]
        frames.send(link, {"open": True})
        walls.make_folder()
        tree = os.fork()
        if tree == 0:
            try:
                jail.die_with(None)
                start_tree(link, order, walls)
            except BaseException:
                # At the level limits a program reaches what we work with (its folder, its user's processes): no fault of ours then.
                if walls.full or not walls.at_work:
                    frames.send(link, {"broken": traceback.format_exc(limit=-3)})
            finally:
                os._exit(0)
        os.waitpid(tree, 0)
        if not walls.full:
            walls.kill_others()
        walls.remove_folder()
        frames.send(link, {"closed": True})


def start_tree(link: int, order: dict[str, object], walls: jail.Jail) -> None:
    """In a process of its own: makes the namespaces, and waits for their process 1, the supervisor."""
    walls.enter_program()
    if walls.full:
        first = os.fork()
        if first != 0:
            os.waitpid(first, 0)
            return
        jail.die_with(None)
    walls.furnish()
    jail.protect()
    supervisor.serve(link, order, walls)


if __name__ == "__main__":
    main()
