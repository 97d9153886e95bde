"""What runs on the far side of the wall: launcher.py is started by its path and imports its neighbours by plain name.

Nothing here imports the package. launcher.py builds the cage once and then forks one process tree for each program:
jail.py (namespaces, mounts, privileges), system_calls.py (the seccomp filter), supervisor.py (process 1 of a tree: starts, watches
and kills), runner.py (what the watched process does), frames.py (the wire to the grader).
"""
