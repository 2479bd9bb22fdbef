"""What a launch does, as data: files to write and commands to run, to be printed or carried out."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from launch.job import Job

# A host that is gone is noticed after 15 s; a password that nobody can type is not asked for.
_SSH = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5",
        "-o", "ServerAliveCountMax=3")  # fmt: skip
# What programs need to find themselves and the user's keys; it stays on this machine.
LOCAL_ONLY = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "SSH_AUTH_SOCK", "SHELL", "KRB5CCNAME",
    "LD_LIBRARY_PATH", "SLURM_CONF", "SLURM_CLUSTERS", "DOCKER_HOST", "DOCKER_CONFIG",
    "DOCKER_CONTEXT", "XDG_RUNTIME_DIR", "CONTAINERS_CONF", "CONTAINERS_STORAGE_CONF",
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """One command of a launch, to be run on a host (None: this one) in `directory` with no more
    than `environment`; `after` it, however it ends, another one."""

    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    directory: Path | None = None
    host: str | None = None
    after: tuple[str, ...] = ()

    @property
    def guarded(self) -> tuple[str, ...]:
        """Arguments of `python`: the command below its guard."""
        after = ("--after", *self.after, "--") if self.after else ()
        return ("-m", "launch.node", *after, *self.arguments)

    def text(self) -> str:
        """As a line of shell that does the same."""
        parts = [f"cd {shlex.quote(str(self.directory))} &&"] if self.directory else []
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        if variables:
            parts += ["env", *variables]
        return " ".join([*parts, shlex.join(self.arguments)])


@dataclass(frozen=True)
class Script:
    """Files, and commands that run at the same time; the launch ends with them. It goes on as long
    as `least` of them do (None: all)."""

    commands: tuple[Command, ...]
    files: dict[Path, str] = field(default_factory=dict)
    least: int | None = None

    def text(self, job: Job) -> str:
        """All of it, as it would be done."""
        parts = []
        for path, content in self.files.items():
            parts.append(f"# --- {path}\n{content.rstrip()}")
        if self.files:
            parts.append("# --- commands")
        parts += [shlex.join(on_host(job, c)) if c.host else c.text() for c in self.commands]
        return "\n".join(parts)


def on_host(job: Job, command: Command) -> list[str]:
    """The local command that runs `command` on its host: its end of input ends it there too."""
    guarded = Command((job.python, *command.guarded), command.environment, command.directory)
    return ssh(job, command.host or "localhost", guarded.text())


def ssh(job: Job, host: str, line: str) -> list[str]:
    """The local command that gives `line` to a shell on `host`."""
    return ["ssh", *_SSH, *job.site.launch.ssh, "--", host, line]
