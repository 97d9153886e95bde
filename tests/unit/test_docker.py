"""docker/: pins agree, what is copied exists, compose.yaml's commands are ours and its GPUs add up. No Docker needed."""

import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docker.dockerfile import arguments, copied, expand, ignore_rules, ignored, parse
from trd_megatron.config import Config, load
from trd_megatron.learner import versions

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
IMAGES = ["cpu", "learner", "rollout"]
INTERPOLATED = re.compile(r"\$\{(\w+)(?::-([^}]*)|:\?[^}]*)\}")


def pins() -> dict[str, str]:
    lines = (DOCKER / "versions.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def locked(file: str = "requirements.lock") -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def services() -> dict[str, dict[str, Any]]:
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    text = INTERPOLATED.sub(lambda match: match[2] or "secret", text)
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]
    return found


def settings(name: str) -> list[str]:
    return [word for word in services()[name]["command"] if "=" in word and not word.startswith("-")]


def gpus(name: str) -> list[str]:
    (device,) = services()[name]["deploy"]["resources"]["reservations"]["devices"]
    ids: list[str] = device["device_ids"]
    return ids


# Pins


@pytest.mark.parametrize("image", IMAGES)
def test_the_defaults_of_a_dockerfile_are_the_pins(image: str) -> None:
    defaults = arguments(parse((DOCKER / f"{image}.Dockerfile").read_text(encoding="utf-8")))
    of_the_build = {"REVISION", "PIP_EXTRA_INDEX_URL"}
    assert {name: pins()[name] for name in defaults.keys() - of_the_build} == {n: v for n, v in defaults.items() if n not in of_the_build}


def test_every_pin_has_a_user() -> None:
    used = set(chain.from_iterable(arguments(parse((DOCKER / f"{image}.Dockerfile").read_text(encoding="utf-8"))) for image in IMAGES))
    assert used >= pins().keys()


def test_the_pins_are_what_is_installed_and_tested_elsewhere() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert f'version="{pins()["TRD_VERSION"]}"' in setup
    assert pins()["TORCH_VERSION"] == locked()["torch"]
    assert pins()["MEGATRON_CORE_VERSION"] == locked()["megatron-core"] == versions.TESTED[-1]
    assert pins()["SGLANG_VERSION"] == locked("tools/sglang_cpu/requirements-nodeps.txt")["sglang"]
    assert pins()["SGLANG_IMAGE"].endswith(f":v{pins()['SGLANG_VERSION']}")
    assert pins()["PYTHON_IMAGE"].startswith("python:3.11.")


def test_compose_runs_the_images_of_this_version() -> None:
    assert {service["image"] for service in services().values()} == {f"trd-{i}:{pins()['TRD_VERSION']}" for i in ("learner", "rollout")}


def test_only_what_no_run_needs_is_left_out() -> None:
    (pattern,) = (DOCKER / "test_only.txt").read_text(encoding="utf-8").split()
    left_out = {name for name in locked() if re.match(pattern, f"{name}==")}
    assert len(left_out) == pattern.count("|") + 1, "each name is one of the lock file"
    sources = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "trd_megatron").rglob("*.py") if path.name != "triton_kernels.py"
    )
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", sources, re.MULTILINE)) - {"triton"}
    assert not {name.replace("-", "_") for name in left_out} & imported


# Contexts and users


@pytest.mark.parametrize("image", IMAGES)
def test_what_is_copied_exists_and_is_not_ignored(image: str) -> None:
    rules = ignore_rules(ROOT)
    for step in parse((DOCKER / f"{image}.Dockerfile").read_text(encoding="utf-8")):
        if step.word == "COPY" and (parts := copied(step))[0] is None:
            for source in parts[1]:
                assert (ROOT / source).exists(), source
                assert not ignored(Path(source), rules), source
                assert not any(ignored(path.relative_to(ROOT), rules) for path in (ROOT / source).rglob("*.py")), source


def test_the_context_has_neither_runs_nor_environments() -> None:
    rules = ignore_rules(ROOT)
    for name in (
        ".git/config",
        ".venv/bin/python",
        "runs/quickstart/config.yaml",
        "docs/docker.md",
        "trd_megatron/__pycache__/x.pyc",
        ".env",
    ):
        assert ignored(Path(name), rules), name


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_not_roots_and_says_what_it_is(image: str) -> None:
    steps = parse((DOCKER / f"{image}.Dockerfile").read_text(encoding="utf-8"))
    assert [step.value for step in steps if step.word == "USER"][-1] == "1000:1000"
    (labels,) = (step.pairs() for step in steps if step.word == "LABEL")
    labels = {name: expand(value, pins() | {"REVISION": "abc"}) for name, value in labels.items()}
    assert labels["org.opencontainers.image.title"] == f"trd-{image}"
    assert labels["org.opencontainers.image.version"] == pins()["TRD_VERSION"]
    assert [step for step in steps if step.word == "HEALTHCHECK"]
    command = next(step for step in reversed(steps) if step.word == "CMD").words()
    parse_command(command)


# compose.yaml


def parse_command(words: list[str]) -> Config | None:
    """Raises click's UsageError or our UserError where `trd` would refuse the words."""
    import typer.main

    from trd_megatron import cli

    assert words[0] == "trd"
    group = typer.main.get_command(cli.app)
    with group.make_context("trd", words[1:]) as context:
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])  # type: ignore[attr-defined]
        assert command is not None
        parameters = command.make_context(name, rest, parent=context).params
    return load(parameters["overrides"] or []) if parameters.get("overrides") else None


@pytest.mark.parametrize("name", ["download", "student", "teacher", "learner"])
def test_a_command_of_compose_is_one_of_ours(name: str) -> None:
    config = parse_command(services()[name]["command"])
    assert config is not None
    assert config.mode == "opd"


def test_the_servers_of_compose_are_those_the_learner_asks() -> None:
    learner = load(settings("learner"))
    assert not learner.engine.launch
    for role in ("student", "teacher"):
        served = getattr(load(settings(role)).engine, role)
        ports = [30000 + index for index in range(served.data_parallel_size)]
        assert getattr(learner.engine, role).urls == [f"http://{role}:{port}" for port in ports]
        assert re.findall(r"\b3\d{4}\b", services()[role]["healthcheck"]["test"][1]) == [str(port) for port in ports]
        command = services()[role]["command"]
        assert {f"--role={role}", "--host=0.0.0.0", "--port=30000"} <= set(command)
    assert load(settings("student")).model.path == learner.model.path
    assert load(settings("teacher")).teacher.path == learner.teacher.path


def test_the_gpus_of_compose_are_eight_and_each_has_one_user() -> None:
    assert sorted([*gpus("learner"), *gpus("student"), *gpus("teacher")]) == [str(index) for index in range(8)]
    learner = load(settings("learner")).learner
    assert len(gpus("learner")) == learner.tensor_model_parallel_size * learner.context_parallel_size * learner.data_parallel_size
    for role in ("student", "teacher"):
        served = getattr(load(settings(role)).engine, role)
        assert len(gpus(role)) == served.data_parallel_size * served.tensor_parallel_size


def test_nothing_of_compose_can_be_reached_from_outside() -> None:
    whole = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    assert whole["networks"] == {"inside": {"internal": True}}
    for name, service in services().items():
        assert "ports" not in service
        assert service.get("networks") == (None if name == "download" else ["inside"])
        assert service["volumes"] == ["runs:/runs", "cache:/cache"]  # one path everywhere, or new weights are not found


def test_secrets_are_named_only() -> None:
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    values = re.findall(r"^\s*(\w*(?:TOKEN|KEY))\s*:\s*(.*)$", text, re.MULTILINE)
    assert len(values) == 2
    assert all(value.startswith(f"${{{name}:") for name, value in values)


def test_who_waits_for_whom() -> None:
    found = services()
    assert {name: part["condition"] for name, part in found["learner"]["depends_on"].items()} == dict.fromkeys(
        ("student", "teacher"), "service_healthy"
    )
    for role in ("student", "teacher"):
        assert found[role]["depends_on"] == {"download": {"condition": "service_completed_successfully"}}
