"""Configuration files of sites."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from hetero_fl.config.base import ConfigSection, FilePath, choice_type
from hetero_fl.config.clients import AugmentConfig, ClientSettings, Models, PreprocessConfig
from hetero_fl.config.data import DEFAULT_ROOT, SourceConfig
from hetero_fl.config.describe import describe_error
from hetero_fl.config.load import read_config_file
from hetero_fl.data import check_source
from hetero_fl.data.registry import HUB_PREFIX
from hetero_fl.deployment.transport import MESSAGE_BYTES
from hetero_fl.utils.code_permission import (
    ALLOW_CODE,
    CODE_PREFIX,
    AllowCode,
    check_code,
    find_references,
)
from hetero_fl.utils.errors import UserError, suggest_or_list


class BudgetConfig(ConfigSection):
    """Privacy budget for the training rows of a site over all runs."""

    epsilon: PositiveFloat = Field(description="ε of all answers of the site")
    delta: float = Field(
        1e-5,
        gt=0,
        lt=1,
        description="δ of the budget; well below 1 / number of training rows",
    )


class AllowsConfig(ConfigSection):
    """Limits that a site enforces for configurations, tasks and answers.

    A limit that is `null` is not enforced.
    """

    methods: list[str] | None = Field(None, description="permitted values of algorithm.name")
    own_code: list[str] = Field(
        [],
        description="`python:module:Name` references that the site runs if the server's "
        "configuration names them; the node also needs `--allow-code`",
    )
    rounds: PositiveInt | None = Field(
        None, description="maximum number of rounds of a run, and of tasks in it"
    )
    epochs: PositiveFloat | None = Field(
        None, description="maximum number of passes over the rows in a task"
    )
    steps: PositiveInt | None = Field(
        None, description="maximum number of optimizer steps in a task"
    )
    upload_bytes: PositiveInt | None = Field(None, description="maximum bytes of an upload")
    total_bytes: PositiveInt | None = Field(
        None, description="maximum bytes of all answers over all runs"
    )
    secure_sum_only: bool = Field(
        False, description="send uploads with secure aggregation or homomorphic encryption only"
    )
    cohort: PositiveInt | None = Field(
        None,
        description="minimum number of clients whose uploads are unmasked together",
    )
    keys: dict[str, str] | None = Field(
        None,
        description="for each other client, the file with the public key of its node, relative to "
        "this file; the sites then sign their keys of secure aggregation, which the server cannot "
        "replace",
    )
    refusals: PositiveInt | None = Field(
        50,
        description="maximum number of refused configurations in 24 hours, because each refusal "
        "reveals whether the data fit; further configurations are refused unread",
    )
    data: list[SourceConfig] = Field(
        [],
        description="for sites without `data`: sources, with all keys, that the site reads if the "
        "server's configuration names them; data sets that ship with the package are always read",
    )
    privacy: BudgetConfig | None = Field(
        None,
        description="accept only runs in which this site adds the noise (privacy.unit: record or "
        "local), up to this budget",
    )

    @model_validator(mode="after")
    def _check_methods(self) -> AllowsConfig:
        from hetero_fl.algorithms import register_algorithm

        for name in self.methods or ():
            if name not in register_algorithm and not name.startswith(CODE_PREFIX):
                hint = suggest_or_list(name, register_algorithm, "`hetero-fl methods`")
                raise ValueError(f"methods: unknown method '{name}'{hint}")
        for name in self.own_code:
            if not name.startswith(CODE_PREFIX):
                raise ValueError(f"own_code: expected python:package.module:Name, got '{name}'")
        return self


class DisclosureConfig(ConfigSection):
    """Information that a site discloses besides uploads, numbers of rows and scores."""

    labels: bool = Field(False, description="counts of labels in the training rows")
    details: bool = Field(False, description="confusion matrix and calibration on the test rows")
    model: bool = Field(False, description="the model after the last round, for the run directory")
    errors: bool = Field(
        False,
        description="reasons of errors and refusals, which may quote rows, names of classes and "
        "paths; false: a code such as `data` or `policy`",
    )


class SiteConfig(ConfigSection):
    """Site file, which `--node-config` of a SuperNode names. The server cannot override it."""

    _removed = {
        "server": "--superlink and --root-certificates of flower-supernode, and the key `key` for "
        "the private key"
    }

    client: str = Field(description="name of the client in the server's configuration")
    folder: str = Field(
        "state", description="folder of private models and the audit log, relative to this file"
    )
    data: SourceConfig | None = Field(
        None,
        description="the site's data; null: its part of the server's data, for tests",
    )
    root: FilePath = Field(DEFAULT_ROOT, description="folder for downloads")
    model: Models | None = Field(
        None, description="the site's model; null: as in the server's configuration"
    )
    preprocess: PreprocessConfig | None = Field(
        None, description="preprocessing; null: as in the server's configuration"
    )
    augment: AugmentConfig | None = Field(
        None, description="augmentation of images; null: as in the server's configuration"
    )
    shares: list[str] | None = Field(
        None,
        description="what the client shares (see clients.defaults.shares); null: as in the "
        "server's configuration",
    )
    device: str | None = Field(None, description="device; null: as in the server's configuration")
    threads: PositiveInt | None = Field(
        None, description="maximum number of threads; null: the server's choice"
    )
    tells: DisclosureConfig = DisclosureConfig()
    allows: AllowsConfig = AllowsConfig()
    shared_key: str | None = Field(
        None,
        description="file with the key of homomorphic encryption, relative to this file, the same "
        "at all sites and never at the server; created by `hetero-fl shared-key`",
    )
    encrypt: str | None = Field(
        None,
        description="file with the key that encrypts the folder, relative to this file; created if "
        "missing",
    )
    key: str | None = Field(
        None,
        description="file with the private key of the SuperNode, relative to this file; signs the "
        "audit log and the keys of secure aggregation; null: unsigned",
    )
    logs: choice_type("text", "json") = Field(  # type: ignore[valid-type]
        "text", description="format of log lines"
    )
    message_bytes: PositiveInt = Field(
        MESSAGE_BYTES,
        description="maximum bytes of a message from the server; longer ones are refused unread",
    )

    @field_validator("data")
    @classmethod
    def _check_own_keys(cls, data: SourceConfig | None) -> SourceConfig | None:
        """Check that the file says what is predicted, which the server must not choose."""
        key = None if data is None else {"table": "label", "text": "text"}.get(data.name)
        if key is not None and getattr(data, key) is None:
            raise ValueError(f"{key}: missing; a site does not take it from the server")
        return data

    def settings(self) -> dict[str, Any]:
        """Return the client settings that the site file defines."""
        settings = self.model_dump(
            mode="json", exclude_unset=True, include={"model", "preprocess", "augment", "shares"}
        )
        return {name: value for name, value in settings.items() if value is not None}


def load_site_config(path: str | Path, allow_code: AllowCode = False) -> tuple[SiteConfig, Path]:
    """Load a site file.

    Args:
        path: Path of the site file.
        allow_code: Whether the site may run the code that the file references, including
            `allows.own_code`.

    Returns:
        The configuration with absolute paths, and the folder of the site.

    Raises:
        UserError: If the file is invalid or references code without permission.
    """
    path = Path(path)
    raw = read_config_file(path)
    try:
        site = SiteConfig.model_validate(raw)
        check_code(find_references(site.model_dump()), str(path), allow_code)
        ClientSettings.model_validate(site.settings(), context={ALLOW_CODE: True})
    except ValidationError as error:
        raise UserError(f"{path}: {describe_error(error, raw, SiteConfig)}") from None
    folder = path.parent
    files = {name: getattr(site, name) for name in ("encrypt", "shared_key", "key")}
    absolute: dict[str, Any] = {
        name: _absolute(file, folder) for name, file in files.items() if file is not None
    }
    if site.allows.keys is not None:
        keys = {client: _absolute(file, folder) for client, file in site.allows.keys.items()}
        absolute["allows"] = site.allows.model_copy(update={"keys": keys})
    if site.data is not None:
        absolute["data"] = _with_absolute_path(site.data, folder)
    return site.model_copy(update=absolute), Path(_absolute(site.folder, folder))


def _absolute(file: str, folder: Path) -> str:
    """Return the absolute path of a file, whose path may be relative to `folder`."""
    return str((folder / Path(file).expanduser()).resolve())


def _with_absolute_path(source: SourceConfig, folder: Path) -> SourceConfig:
    """Return a source whose path, or folder after `hf:`, is absolute."""
    if source.path is not None:
        return source.model_copy(update={"path": _absolute(source.path, folder)})
    reference = source.name.removeprefix(HUB_PREFIX)
    absolute = _absolute(reference, folder)
    # Names of the hub look like relative paths.
    is_folder = reference.startswith((".", "~")) or os.path.exists(absolute)
    if source.name.startswith(HUB_PREFIX) and reference and is_folder:
        return source.model_copy(update={"name": f"{HUB_PREFIX}{absolute}"})
    return source


def check_site_data(path: Path, site: SiteConfig) -> None:
    """Check that a site's data can be loaded.

    Args:
        path: Path of the site file, for error messages.
        site: Configuration of the site.

    Raises:
        UserError: If the data cannot be loaded.
    """
    if site.data is None:
        return
    try:
        check_source(site.data)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
