"""The configuration of `cap push`."""

from __future__ import annotations

from dataclasses import dataclass

from capcli.config.options import option
from capcli.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """A folder that capcli wrote, and the repository of the hub that it goes to."""

    folder: str = ""
    repo: str = ""
    private: bool = option(False, "make the repository private; for a new one")
    dry_run: bool = option(False, "list the files and what they would change, and send nothing")
    message: str = option("", "message of the commit")

    def __post_init__(self) -> None:
        if not self.folder:
            raise ConfigError("no FOLDER given", "name the output folder of cap prune or cap export")
        if not self.repo:
            raise ConfigError("no repository given", "name it as OWNER/NAME, where OWNER is you or your organisation")
