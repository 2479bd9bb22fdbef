"""The folders of a run that its containers have to have, at the same place."""

from pathlib import Path

from launch.job import Job
from pretrain.errors import UserError


def mounts_of(job: Job) -> dict[Path, bool]:
    """The folders that a run needs at the same place in its container, and whether it writes there;
    those that lie in another are left out."""
    data = job.config.data
    read = [source.path.parent for source in data.sources] + [job.config_path.parent]
    read += [data.tokenizer] if data.tokenizer else []
    write = [job.directory, _nearest(job.config.directory)]
    write += [data.index_directory] if data.index_directory else []
    found: dict[Path, bool] = {}
    for path, writable in [*((p, True) for p in write), *((p, False) for p in read)]:
        if not any(path.is_relative_to(p) for p in found):
            found = {
                p: w for p, w in found.items() if not (p.is_relative_to(path) and w <= writable)
            }
            found[path] = writable
    for path in found:
        if set(str(path)) & _SEPARATORS or not str(path).isprintable():
            raise UserError(
                f"{path}: cannot be given to a container\n"
                "  rule: no comma, colon, quote or line break in its path\n"
                "  cure: rename the folder, or link to it"
            )
    return found


def _nearest(path: Path) -> Path:
    """A folder that is there and in which `path` is or will be: others cannot be mounted."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


# Of mounts, in the options of Docker, pyxis and apptainer.
_SEPARATORS = {",", ":", '"'}
