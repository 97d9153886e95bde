"""Executes docker/cpu.Dockerfile in new root directories, step by step, without Docker. Debian, as root.

    python tests/docker/run_cpu_image_steps.py --root FOLDER [--share PATH]... [--build-arg NAME=VALUE]... [-- COMMAND...]

Debian 12 with its own Python 3.11 (debootstrap) stands in for the base image. RUN and COPY are carried out as written, in a mount and
process namespace of their own; the last command (CMD, or COMMAND) runs as the image's user, without a network.
FOLDER/base is kept and used again, FOLDER/stage-N are made anew; FOLDER/runs and FOLDER/cache are what a user would mount.
--share: paths of this machine that pip needs (its configuration, a local index), bound read-only while RUN steps run.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from dockerfile import Step, copied, expand, ignore_rules, ignored, parse

REPOSITORY = Path(__file__).parents[2]
DOCKERFILE = REPOSITORY / "docker" / "cpu.Dockerfile"
# What python:3.11-slim has besides a minimal Debian, and the headers that go with its Python.
PACKAGES = ("ca-certificates", "python3.11", "python3.11-dev", "python3.11-venv")
PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"  # the base image's
VOLUMES = ("runs", "cache")


def make_base(base: Path) -> None:
    """A Debian 12 root with `python`, as the base image has it."""
    if (base / "usr/local/bin/python").is_symlink():
        return
    shutil.rmtree(base, ignore_errors=True)
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", str(base)], check=True, stdout=subprocess.DEVNULL)
    # debootstrap's own --include does not see which of two alternative dependencies to take.
    binds = {Path("/etc/resolv.conf"): "/etc/resolv.conf"}
    environment = {"PATH": PATH, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *PACKAGES]
    inside(base, install, environment, "/", "0", binds, network=True)
    inside(base, ["apt-get", "clean"], environment, "/", "0", binds, network=True)
    for name in ("python", "python3"):
        (base / "usr/local/bin" / name).symlink_to("/usr/bin/python3.11")


def inside(
    root: Path, command: list[str], environment: dict[str, str], folder: str, user: str, binds: dict[Path, str], network: bool
) -> None:
    """Runs a command with `root` as /, /proc, /dev and `binds` mounted, in namespaces of its own; raises if it fails.

    binds: path of this machine -> path in the root. Without a network there is the loopback interface alone.
    """
    uid, _, gid = user.partition(":")
    script = ["set -e", f"mount -t proc proc {root}/proc", f"mount --rbind /dev {root}/dev"]
    for source, target in binds.items():
        place = root / target.lstrip("/")
        if source.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        script.append(f"mount --bind {shlex.quote(str(source))} {shlex.quote(str(place))}")
    if not network:
        script.append("ip link set lo up")
    words = ["setpriv", f"--reuid={uid}", f"--regid={gid or uid}", "--clear-groups", "--no-new-privs"] if uid != "0" else []
    line = f"cd {shlex.quote(folder)} && exec {shlex.join([*words, *command])}"
    script.append(f"exec chroot {root} /bin/sh -c {shlex.quote(line)}")
    spaces = ["unshare", "--mount", "--pid", "--fork", "--ipc", *([] if network else ["--net"])]
    subprocess.run([*spaces, "sh", "-c", "\n".join(script)], env=environment, check=True)


class Stage:
    """What one FROM begins: its root directory, and what ARG, ENV, USER and WORKDIR have set."""

    def __init__(self, root: Path, base: Path, share: list[Path]) -> None:
        self.root, self._share = root, share
        self.variables: dict[str, str] = {}  # ARGs
        self.environment = {"PATH": PATH, "HOME": "/root"}
        self.user, self.folder, self.command = "0", "/", [""]
        shutil.rmtree(root, ignore_errors=True)
        subprocess.run(["cp", "--archive", str(base), str(root)], check=True)

    def run(self, line: str) -> None:
        binds = {path: str(path) for path in [*self._share, Path("/etc/resolv.conf")]}
        inside(self.root, ["/bin/sh", "-c", line], self.variables | self.environment, self.folder, self.user, binds, network=True)

    def copy(self, source_root: Path, source: str, target: str, rules: list[str] | None) -> None:
        """rules: of .dockerignore, for what comes from the repository."""
        source_path = source_root / source.lstrip("/")
        place = self.root / os.path.join(self.folder, target).lstrip("/")
        if source_path.is_file():
            place = place / source_path.name if target.endswith("/") else place
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source_path, place)
            return

        def leave_out(folder: str, names: list[str]) -> set[str]:
            relative = Path(folder).relative_to(source_root)
            return {name for name in names if rules is not None and ignored(relative / name, rules)}

        shutil.copytree(source_path, place, symlinks=True, dirs_exist_ok=True, ignore=leave_out)


def build(folder: Path, given: dict[str, str], share: list[Path]) -> Stage:
    """Carries out the Dockerfile; returns its last stage."""
    rules = ignore_rules(REPOSITORY)
    globals_: dict[str, str] = {}
    stages: list[Stage] = []
    by_name: dict[str, Stage] = {}
    for step in parse(DOCKERFILE.read_text(encoding="utf-8")):
        print(f"==> {step.word} {step.value}", flush=True)
        began = time.monotonic()
        if step.word == "FROM":
            image, _, name = step.value.partition(" AS ")
            print(f"    {expand(image, globals_)}: Debian's own Python 3.11 stands in")
            stages.append(Stage(folder / f"stage-{len(stages)}", folder / "base", share))
            by_name[name] = stages[-1]
        elif step.word == "ARG" and not stages:
            name, _, default = step.value.partition("=")
            globals_[name] = given.get(name, default)
        else:
            carry_out(step, stages[-1], by_name, globals_, given, rules)
        if step.word == "RUN":
            print(f"    {time.monotonic() - began:.1f} s", flush=True)
    return stages[-1]


def carry_out(
    step: Step, stage: Stage, by_name: dict[str, Stage], globals_: dict[str, str], given: dict[str, str], rules: list[str]
) -> None:
    if step.word == "ARG":
        name, has_default, default = step.value.partition("=")
        stage.variables[name] = given.get(name, default if has_default else globals_[name])
    elif step.word == "ENV":
        known = stage.variables | stage.environment
        stage.environment |= {name: expand(value, known) for name, value in step.pairs().items()}
    elif step.word == "RUN":
        stage.run(step.value)
    elif step.word == "COPY":
        name, sources, target = copied(step)
        for source in sources:
            if name is not None:
                stage.copy(by_name[name].root, source, target, None)
            elif ignored(Path(source), rules):
                raise ValueError(f"COPY {source}: .dockerignore leaves it out")
            else:
                stage.copy(REPOSITORY, source, target, rules)
    elif step.word == "USER":
        stage.user = step.value
    elif step.word == "WORKDIR":
        stage.folder = step.value
        (stage.root / step.value.lstrip("/")).mkdir(parents=True, exist_ok=True)
    elif step.word == "CMD":
        stage.command = step.words()
    elif step.word == "LABEL":
        expand(step.value, stage.variables | stage.environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--share", type=Path, action="append", default=[])
    parser.add_argument("--build-arg", action="append", default=[])
    parser.add_argument("command", nargs="*")
    options = parser.parse_args()
    folder = options.root.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    make_base(folder / "base")
    print(f"base: {time.monotonic() - began:.1f} s", flush=True)
    began = time.monotonic()
    image = build(folder, dict(word.split("=", 1) for word in options.build_arg), options.share)
    size = subprocess.run(["du", "-sm", str(image.root), str(folder / "base")], check=True, capture_output=True, text=True).stdout.split()
    print(f"image: {time.monotonic() - began:.1f} s; {size[0]} MiB, {size[2]} MiB of them the base")
    binds = {}
    uid = int(image.user.partition(":")[0])
    for volume in VOLUMES:
        (folder / volume).mkdir(exist_ok=True)
        os.chown(folder / volume, uid, uid)
        binds[folder / volume] = f"/{volume}"
    began = time.monotonic()
    command = options.command or image.command
    print(f"==> as {image.user}, without a network: {shlex.join(command)}", flush=True)
    inside(image.root, command, image.environment | {"HOME": "/home/trd"}, image.folder, image.user, binds, network=False)
    print(f"command: {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
