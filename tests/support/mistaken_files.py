"""Read files that users wrote with a mistake, for tables of error messages."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from hetero_fl.config import expand_population
from hetero_fl.deployment.config import SiteConfig, load_site_config
from hetero_fl.deployment.policy import check_config
from hetero_fl.experiment.configuration import load_config
from tests.support.deployments import small


def read_site(**changes: Any) -> None:
    """Read the file of a site with these changes."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "site.yaml"
        file.write_text(yaml.safe_dump({"client": "north", **changes}))
        load_site_config(file)


def check_terms(site: dict[str, Any], **changes: Any) -> None:
    """Check a server's configuration against the file of a site."""
    source = load_config(small(**changes))
    found = SiteConfig.model_validate({"client": "site_1", **site})
    check_config(source, found, expand_population(source.clients)["site_1"])
