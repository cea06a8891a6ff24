"""A workspace: the folder with params.yaml, dvc.yaml, the tile store and every result.

Layout, relative to the workspace's root:

    params.yaml, dvc.yaml, dvc.lock   what runs; with revisions.yaml and champion.yaml
    data/store/            the tile store (data/store.dvc beside it), data/versions.jsonl
    work/STAGE/            a stage's outputs (stage `finetune@scene` writes work/finetune-scene/)
    .ringmo/               this machine's state: servers, checkpoints, figures, reports
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import ringmo
from ringmo.errors import BadInput

MADE_BY = ".ringmo-version"  # the version of ringmo that made a workspace
CHAMPION = "champion.yaml"  # which encoder is taken instead of pre-training one

# Hard links: the store's shards and DVC's cache are the same bytes on disk, not twice.
# no_scm: a workspace need not be a git repository; where it is, DVC has nothing to ask of git.
DVC_CONFIG = """\
[core]
    analytics = false
    check_update = false
    no_scm = true
    autostage = false
    remote = main
[cache]
    type = "reflink,hardlink,copy"
['remote "main"']
    url = ../.ringmo/remote
"""


@dataclass(frozen=True)
class Workspace:
    """Paths of one workspace. `root` is absolute."""

    root: Path

    @classmethod
    def find(cls, chosen: str | os.PathLike[str] | None = None) -> "Workspace":
        """The workspace of --workspace, of RINGMO_WORKSPACE, or of the current folder."""
        root = Path(chosen or os.environ.get("RINGMO_WORKSPACE") or ".").resolve()
        if not (root / "params.yaml").is_file() or not (root / "dvc.yaml").is_file():
            raise BadInput(
                f"{root} is no workspace (params.yaml or dvc.yaml is missing): "
                f"go to one, name one with --workspace, or make one with `ringmo init DIR`"
            )
        return cls(root)

    @property
    def params_file(self) -> Path:
        return self.root / "params.yaml"

    @property
    def store(self) -> Path:
        """The tile store's folder."""
        return self.root / "data" / "store"

    @property
    def versions_file(self) -> Path:
        """Append-only log of data versions, one JSON object a line."""
        return self.root / "data" / "versions.jsonl"

    @property
    def state(self) -> Path:
        """What belongs to this machine and is never versioned."""
        return self.root / ".ringmo"

    def work(self, stage: str) -> Path:
        """Output folder of a stage."""
        return self.root / "work" / stage.replace("@", "-")

    def report_file(self, stage: str) -> Path:
        """Report of the stage's last execution, successful or not."""
        return self.state / "reports" / f"{stage.replace('@', '-')}.json"

    def run_dir(self, stage: str, fingerprint: str) -> Path:
        """Checkpoints, figures and pictures of one training, resumable under this fingerprint."""
        return self.state / "runs" / f"{stage.replace('@', '-')}-{fingerprint[:16]}"


def template(name: str) -> Path:
    """A file every workspace starts from: in a checkout, or inside an installed package."""
    package = Path(__file__).parent
    for place in (package / "template", package.parent):
        if (place / name).exists():
            return place / name
    raise BadInput(f"{name} is missing from the installed ringmo: install it again")


def init(root: Path) -> Workspace:
    """Make a workspace: its parameters and stage graph, what git and DVC ignore, DVC's folder.

    Raises:
        BadInput: there is a workspace already, or the folder cannot be written.
    """
    root = root.resolve()
    if (root / "params.yaml").exists():
        raise BadInput(f"{root} is a workspace already")
    try:
        root.mkdir(parents=True, exist_ok=True)
        for name in ("params.yaml", "dvc.yaml", "revisions.yaml", "champion.yaml", ".dvcignore"):
            shutil.copyfile(template(name), root / name)
        (root / MADE_BY).write_text(f"{ringmo.__version__}\n")
        (root / ".gitignore").write_text(".ringmo/\n/data/store\n/work/\n")
        (root / ".dvc").mkdir(exist_ok=True)
        (root / ".dvc" / "config").write_text(DVC_CONFIG)
        (root / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
    except OSError as error:
        raise BadInput(f"{root}: {error.strerror}") from error
    return Workspace(root)
