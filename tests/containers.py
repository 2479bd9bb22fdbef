"""Containers for tests, by Debian's buildah and podman, without a registry and without a daemon.

Storage, settings and networks are private and lie in a temporary folder. The programs run in
namespaces that live as long as a process that reads a pipe from this one, so mounts, bridges and
containers are gone even after a `kill -9`; only the folder may then be left.
"""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD_SECONDS, RUN_SECONDS = 900, 240
_PACKAGES = {
    "buildah": "buildah", "podman": "podman", "runc": "runc", "iptables": "iptables",
    "/usr/lib/podman/netavark": "netavark", "/usr/lib/podman/aardvark-dns": "aardvark-dns",
    "mmdebstrap": "mmdebstrap", "ip": "iproute2", "nsenter": "util-linux",
    "/usr/share/keyrings/debian-archive-keyring.gpg": "debian-archive-keyring",
}  # fmt: skip
_FREE_BYTES = 8 * 10**9
# runc rather than crun, which refuses some machines' cgroups; limits below those that a container
# in a container may have.
_SETTINGS = {
    "storage.conf": """
[storage]
driver = "overlay"
graphroot = "{folder}/storage"
runroot = "{folder}/run"
""",
    "containers.conf": """
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=8192:8192"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
tmp_dir = "{folder}/libpod"
[network]
network_backend = "netavark"
network_config_dir = "{folder}/networks"
""",
}
# As in tests/hosts.py: the pid is read before /proc is its own.
_INIT = """
read -r pid rest < /proc/self/stat
mount -t proc proc /proc
for place in /run/runc /run/netns /run/containers; do
    mkdir -p $place
    mount -t tmpfs tmpfs $place
done
ip link set lo up
echo "$pid"
cat > /dev/null
exit
"""
_TRIAL = """
cd "$1"
mkdir low up work all
mount -t overlay overlay -o lowerdir=low,upperdir=up,workdir=work all
"""
_OWN_NAMESPACES = ("--net", "--pid", "--mount", "--fork", "--kill-child")


@functools.cache
def reason_missing() -> str | None:
    """Why images cannot be built and run on this machine, or None where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "images are built by root on Linux"
    missing = {package for tool, package in _PACKAGES.items() if not shutil.which(tool)
               and not (tool.startswith("/") and Path(tool).exists())}  # fmt: skip
    if missing:
        return f"images need the packages {', '.join(sorted(missing))}"
    with tempfile.TemporaryDirectory() as folder:
        if (free := shutil.disk_usage(folder).free) < _FREE_BYTES:
            return f"images need 8 GB on the disk of {folder}, {free / 1e9:.1f} are free"
        trial = ["unshare", *_OWN_NAMESPACES, "sh", "-ec", _TRIAL, "sh", folder]
        done = subprocess.run(trial, capture_output=True, text=True, timeout=RUN_SECONDS)
    if done.returncode:
        return f"this kernel or container allows no overlays in containers: {done.stderr.strip()}"
    return None


class Containers:
    """A place for images and containers from `with` on; at its end nothing is left of them."""

    def __init__(self) -> None:
        self.folder = Path()
        self._init: subprocess.Popen | None = None
        self._pid = 0

    def __enter__(self) -> "Containers":
        self.folder = Path(tempfile.mkdtemp(prefix="anthesis-images-"))
        for name, text in _SETTINGS.items():
            (self.folder / name).write_text(text.format(folder=self.folder))
        for name in ("tmp", "networks"):
            (self.folder / name).mkdir()
        self._init = subprocess.Popen(
            ["unshare", *_OWN_NAMESPACES, "sh", "-ec", _INIT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        self._pid = int(self._init.stdout.readline())
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(subprocess.SubprocessError):
            self.podman("rm", "--all", "--force", "--time", "0")  # and their cgroups
        self._init.stdin.close()
        self._init.wait(RUN_SECONDS)
        self._init.stdout.close()
        shutil.rmtree(self.folder)

    # --- images -----------------------------------------------------------------------------------

    def base(self, suite: str = "bookworm") -> str:
        """An image of a bare Debian, made of its packages."""
        archive, name = self.folder / "base.tar", f"localhost/debian:{suite}"
        self._call(["mmdebstrap", "--quiet", "--variant=minbase", suite, str(archive)], online=True)
        self.podman("import", "--quiet", "--change", 'CMD ["bash"]', str(archive), name)
        archive.unlink()
        return name

    def build(self, context: Path, name: str, *options: str) -> str:
        """The image of `context`'s Dockerfile; what building it printed."""
        # Isolation by chroot needs no network of its own; `docker` keeps what OCI has no word for.
        how = ("--isolation", "chroot", "--format", "docker", "--layers=false")
        line = ["buildah", "bud", *how, *options, "--tag", name, str(context)]
        return self._call(line, online=True, seconds=BUILD_SECONDS).stdout

    # --- containers -------------------------------------------------------------------------------

    def podman(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        """`podman ARGUMENTS`, with what it printed; raises where it fails, if `check`."""
        return self._call(["podman", *arguments], check=check)

    def run(self, *arguments: str, check: bool = True) -> str:
        """`podman run ARGUMENTS` without a network, and all that it printed."""
        line = ("run", "--rm", "--network=none", f"--timeout={RUN_SECONDS}", *arguments)
        return self.podman(*line, check=check).stdout

    def start(self, name: str, *arguments: str) -> None:
        """`podman run ARGUMENTS` in the background, as a container to be asked for by its name."""
        own = ("--name", name, "--hostname", name, f"--timeout={RUN_SECONDS}")
        self.podman("run", "--detach", *own, *arguments)

    def wait(self, name: str) -> tuple[int, str]:
        """A container's exit code and all that it printed, once it has ended."""
        code = int(self.podman("wait", name).stdout)
        return code, self.podman("logs", name).stdout

    def shell(self, line: str) -> tuple[int, str]:
        """Exit code and output of a line of shell, in which `podman` is ours."""
        done = self._call(["sh", "-c", line], check=False)
        return done.returncode, done.stdout

    def _call(
        self,
        line: list[str],
        online: bool = False,
        check: bool = True,
        seconds: float = RUN_SECONDS,
    ) -> subprocess.CompletedProcess:
        """A program in our namespaces; `online`: in the machine's network, to download."""
        enter = ["nsenter", f"--target={self._pid}", "--pid", "--mount"]
        done = subprocess.run(
            [*enter, *([] if online else ["--net"]), *line],
            env=os.environ
            | {
                "CONTAINERS_STORAGE_CONF": str(self.folder / "storage.conf"),
                "CONTAINERS_CONF": str(self.folder / "containers.conf"),
                "TMPDIR": str(self.folder / "tmp"),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
        )
        if check and done.returncode:
            end = "\n".join(done.stdout.splitlines()[-40:])
            raise RuntimeError(f"{' '.join(line)}: exit code {done.returncode}\n{end}")
        return done


def pip_settings(folder: Path) -> tuple[str, Path | None, Path]:
    """What this machine's pip is told, for the pip of a build: the text of a pip.conf, a file of
    certificates to trust, and a folder below `folder` with the wheels that lie in local ones."""
    line = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(line, capture_output=True, text=True).stdout
    told: dict[str, str] = {}
    for level in ("global", "install", ":env:"):  # each overrules those before it
        for key, value in re.findall(rf"^{level}\.(?:default-)?([\w-]+)=(.+)$", listed, re.M):
            told[key] = ast.literal_eval(value)
    wheels = folder / "wheels"
    wheels.mkdir()
    kept = ["[global]"]
    for key in ("index-url", "extra-index-url", "find-links", "trusted-host", "proxy", "timeout"):
        # Indexes on this machine's disk are mirrors of others; their folders stay outside.
        places = [part for part in told.get(key, "").split() if not part.startswith("file:")]
        for place in [part for part in places if key == "find-links" and Path(part).is_dir()]:
            places.remove(place)
            for wheel in Path(place).glob("*.whl"):
                _link(wheel, wheels / wheel.name)
        if places:
            kept.append(f"{key} = {' '.join(places)}")
    certificates = told.get("cert") or os.environ.get("SSL_CERT_FILE")
    return "\n".join(kept) + "\n", Path(certificates) if certificates else None, wheels


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another disk
        shutil.copy(source, target)
