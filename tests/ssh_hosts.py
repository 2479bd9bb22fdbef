"""Hosts that reach each other by ssh, as launchers such as pdsh need it.

Each has an sshd of its own that takes no variables from who logs in, and a PATH there without our
virtual environment, as on a cluster. What differs from this machine (client settings, keys, /run)
is mounted inside each host, so nothing of it is changed, and all is gone with the host.
"""

import functools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests import hosts
from tests.hosts import Hosts

PACKAGES = {
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "/usr/sbin/sshd": "openssh-server",
    "pdsh": "pdsh",
    "cc": "gcc, libc6-dev",
}
_PATIENCE_SECONDS = 20

_CLIENT = """
Host *
    BatchMode yes
    ConnectTimeout 5
    IdentitiesOnly yes
    IdentityFile /run/ssh/key
    LogLevel ERROR
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
"""
# pdsh opens connections by the dozen. Without PAM no variable comes from this machine's files.
_SERVER = """
AuthorizedKeysFile /run/ssh/key.pub
HostKey /run/ssh/key
MaxStartups 200
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
UsePAM no
"""


# Only the time of day is wrong. Waits until a time of day must be put right again, or they would
# last too long or not at all; a clock that counts from start-up never gets to a billion seconds.
# (libfaketime of Debian 12 fails Python's `time.sleep`.)
_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static struct timespec later(struct timespec t, int sign) {
    const char *seconds = getenv("CLOCK_SHIFT_SECONDS");
    if (seconds) t.tv_sec += sign * atol(seconds);
    return t;
}
int clock_gettime(clockid_t clock, struct timespec *t) {
    int failed = syscall(SYS_clock_gettime, clock, t);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) *t = later(*t, 1);
    return failed;
}
int gettimeofday(struct timeval *t, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *t) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (t) *t = now.tv_sec;
    return now.tv_sec;
}
int pthread_cond_timedwait(pthread_cond_t *c, pthread_mutex_t *m, const struct timespec *until) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    if (!real) real = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");  // x86
    if (!real) real = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    struct timespec right = until->tv_sec > 1000000000 ? later(*until, -1) : *until;
    return real(c, m, &right);
}
int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    static int (*real)(sem_t *, const struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "sem_timedwait");
    struct timespec right = later(*until, -1);
    return real(semaphore, &right);
}
"""


@functools.cache
def reason_missing() -> str | None:
    """Why hosts with ssh cannot be had on this machine, or None where they can."""
    return hosts.reason_missing() or missing_programs(PACKAGES)


def missing_programs(packages: dict[str, str]) -> str | None:
    """Which of the programs that are the keys are missing, and the Debian packages they are in."""
    missing = [program for program in packages if not shutil.which(program)]
    if not missing:
        return None
    needed = sorted({packages[program] for program in missing})
    return f"no {', '.join(missing)} (packages {', '.join(needed)}; .ci/packages installs them)"


class SshHosts(Hosts):
    """Hosts whose root logs in at each other without a question."""

    def __init__(self, count: int):
        super().__init__(count)
        self._key, self._public_key = _make_key()
        self._servers: dict[int, subprocess.Popen] = {}
        self._clocks: dict[int, int] = {}

    def boot(self, i: int) -> None:
        """Host `i` up, with sshd. Its disks and mounts are new, its clock is as wrong as before."""
        super().boot(i)
        # Only what is below /run is its own: the rest of the file system is everybody's.
        self._mount(i, "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/run")
        # The user's own settings would be stronger than ours, or let sessions differ by machine.
        home = Path.home()
        if (home / ".ssh").is_dir():
            self._mount(i, "-t", "tmpfs", "-o", "mode=700", "tmpfs", str(home / ".ssh"))
        if (home / ".bashrc").is_file():
            self.mount(i, "/dev/null", home / ".bashrc")
        own = self.folder(i, "/run/ssh")
        self.folder(i, "/run/sshd")
        for name, text in (
            ("key", self._key), ("key.pub", self._public_key), ("client", _CLIENT),
        ):  # fmt: skip
            (own / name).write_text(text)
            (own / name).chmod(0o600 if name == "key" else 0o644)
        self.mount(i, "/run/ssh/client", "/etc/ssh/ssh_config")
        self._start_server(i)

    # --- commands ---------------------------------------------------------------------------------

    def run(
        self,
        i: int,
        command: list[str],
        env: dict[str, str] | None = None,
        timeout: float = 60,
        cwd: str | Path | None = None,
    ) -> tuple[int, str]:
        """Exit code and output (both streams) of `command` on host `i`; it dies at `timeout`."""
        if cwd:
            command = ["env", f"--chdir={cwd}", *command]
        with tempfile.NamedTemporaryFile() as output:
            process = self.start(i, command, env or {}, Path(output.name))
            try:
                code = process.wait(timeout)
            except BaseException as error:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(_PATIENCE_SECONDS)
                if isinstance(error, subprocess.TimeoutExpired):
                    said = Path(output.name).read_text(errors="replace")
                    raise TimeoutError(f"h{i}: {command} took over {timeout} s:\n{said}") from None
                raise
            return code, Path(output.name).read_text(errors="replace")

    def processes(self, i: int, pattern: str = "") -> list[str]:
        """Command lines of the living processes of host `i` in which `pattern` is found."""
        found = []
        for process in Path(f"/proc/{self._up(i).pid}/root/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has gone in between
                words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                line = " ".join(words).strip()  # empty for a zombie
                if line and process.name != "1" and re.search(pattern, line):
                    found.append(line)
        return found

    # --- files ------------------------------------------------------------------------------------

    def folder(self, i: int, path: str | Path) -> Path:
        """The folder `path` as host `i` has it, made if need be; the path is for this process."""
        folder = Path(f"/proc/{self._up(i).pid}/root{path}")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def mount(self, i: int, source: str | Path, target: str | Path) -> None:
        """Host `i` finds the file or folder `source` of its own at `target`; no other host does."""
        self._mount(i, "--bind", str(source), str(target))

    def small_disk(self, i: int, folder: str | Path, size: str = "8m") -> None:
        """An empty disk of that size at `folder`, on host `i` only; gone when it is booted."""
        self.folder(i, folder)
        self._mount(i, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))

    # --- clock ------------------------------------------------------------------------------------

    def shift_clock(self, i: int, seconds: int) -> None:
        """New ssh sessions on host `i` read a clock that is fast by so much, or slow if negative.

        What `start` and `run` start there has the right time: the kernel has one clock for all.
        """
        self._clocks[i] = seconds
        server = self._servers.pop(i)
        server.terminate()
        server.wait(_PATIENCE_SECONDS)
        self._start_server(i)

    # --- inside -----------------------------------------------------------------------------------

    def _start_server(self, i: int) -> None:
        own = self.folder(i, "/run/ssh")
        settings = _SERVER
        if shift := self._clocks.get(i):
            (own / "clock.so").write_bytes(_compile_clock())
            settings += f"SetEnv LD_PRELOAD=/run/ssh/clock.so CLOCK_SHIFT_SECONDS={shift}\n"
        (own / "server").write_text(settings)
        log = own / "log"
        command = ["/usr/sbin/sshd", "-D", "-e", "-f", "/run/ssh/server"]
        server = self._servers[i] = self.start(i, command, {}, log)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while "Server listening" not in log.read_text():
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no sshd on h{i}: {log.read_text()}")
            time.sleep(0.01)

    def _mount(self, i: int, *arguments: str) -> None:
        whole = ["nsenter", f"--mount=/proc/{self._up(i).pid}/ns/mnt", "mount", *arguments]
        done = subprocess.run(whole, capture_output=True, text=True, timeout=_PATIENCE_SECONDS)
        if done.returncode:
            raise RuntimeError(f"h{i}: {done.stderr.strip()}")


def _make_key() -> tuple[str, str]:
    """A pair of keys, for hosts and users alike: none but these hosts reach each other."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "key"
        subprocess.run(["ssh-keygen", "-qt", "ed25519", "-N", "", "-f", str(path)], check=True)
        return path.read_text(), path.with_suffix(".pub").read_text()


@functools.cache
def _compile_clock() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "clock.so"
        command = ["cc", "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library), "-ldl"]
        subprocess.run(command, input=_CLOCK, text=True, check=True)
        return library.read_bytes()
