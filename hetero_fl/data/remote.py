"""Data whose rows are partly on other machines, and serialization of the public sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import DataConfig
from hetero_fl.config.population import Population
from hetero_fl.core.images import MAX_BYTE
from hetero_fl.core.stored_rows import read_all
from hetero_fl.core.task import Task
from hetero_fl.data.client_rows import ClientRows, RemoteDataInfo, fingerprint
from hetero_fl.data.client_sources import load_client_sources
from hetero_fl.data.dataset import Block, ColumnLayout, Dataset, Examples, Vocabulary
from hetero_fl.data.federated_data import PRIVATE, FederatedData
from hetero_fl.data.pixels import choose_range
from hetero_fl.data.preprocessing import check_missing_values
from hetero_fl.data.splits import RowSelection
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import decode, encode


def describe_client_rows(
    data: FederatedData, client: str, send_view: bool, labels: bool
) -> RemoteDataInfo:
    """Return the information about a client's rows that is sent to the other participants.

    Args:
        data: Data of the federation.
        client: Client id.
        send_view: Whether to include the preprocessing of the client. Other participants cannot
            compute the preprocessing if it depends on the rows (`normalize: own`).
        labels: Whether to include the label counts of the training rows.
    """
    splits = data.client_rows[client]
    counts = tuple(data.label_counts(client).tolist()) if labels else None
    return RemoteDataInfo(
        {name: len(splits[name].rows) for name in PRIVATE},
        fingerprint("rows of a client", [(name, splits[name]) for name in PRIVATE]),
        data.preprocess(client) if send_view else None,
        counts,
    )


def restrict_to_holder(
    data: FederatedData, client: str | None, remote_info: Mapping[str, RemoteDataInfo]
) -> FederatedData:
    """Return a copy of the data that contains the rows of one participant only.

    Args:
        data: Data of the federation.
        client: Client whose rows are kept. If None, no rows are kept, as for the server.
        remote_info: Information about the rows of the other clients.

    Raises:
        KeyError: If `remote_info` lacks a client.
    """
    own = {client: data.client_rows[client]} if client is not None else {}
    others = {other: remote_info[other] for other in data.client_ids if other not in own}
    return data.with_rows(ClientRows(own, remote_info=others))


FORM = "public sets 1"


@dataclass(frozen=True)
class PublicPack:
    """The public sets of a federation, to be sent to participants that do not have the data set.

    Attributes:
        name: Name of the data set.
        about: Short description.
        simulated: Whether the data is simulated.
        task: Learning task.
        layout: Names of the columns or blocks along the last axis of the examples.
        vocabulary: Vocabulary if the examples are tokens, otherwise None.
        public: Public sets, keyed by "common_validation", "common_test" and, if there is a proxy
            set, "proxy".
    """

    name: str
    about: str
    simulated: bool
    task: Task
    layout: ColumnLayout
    vocabulary: Vocabulary | None
    public: Mapping[str, Examples]

    @classmethod
    def from_data(cls, data: FederatedData) -> PublicPack:
        """Create a pack from the public sets of a federation."""
        public = {name: share.copy_rows() for name, share in data.public_sets.items()}
        return cls(
            data.name, data.about, data.simulated, data.task, data.layout, data.vocabulary, public
        )

    def encode(self) -> bytes:
        """Serialize the pack to bytes, without pickle.

        The groups and patients of the rows are not included.
        """
        vocabulary = None
        if self.vocabulary is not None:
            vocabulary = {"words": self.vocabulary.words, "buckets": self.vocabulary.buckets}
        content = {
            "name": self.name,
            "about": self.about,
            "simulated": self.simulated,
            "task": vars(self.task),
            "columns": self.layout.columns,
            "categories": self.layout.categories,
            "pixel_range": self.layout.pixel_range,
            "blocks": [[block.name, block.shape] for block in self.layout.blocks],
            "vocabulary": vocabulary,
            "public": {name: _public_columns(examples) for name, examples in self.public.items()},
        }
        return encode(content, FORM)

    @classmethod
    def decode(cls, data: bytes) -> PublicPack:
        """Create a pack from bytes that were returned by `encode`.

        Raises:
            CodecError: If the bytes are malformed.
        """
        content = decode(data, FORM)
        blocks = tuple(Block(name, tuple(shape)) for name, shape in content["blocks"])
        categories = tuple((c, tuple(v)) for c, v in content.get("categories", ()))
        vocabulary = content["vocabulary"]
        return cls(
            content["name"],
            content["about"],
            content["simulated"],
            Task(**{**content["task"], "names": tuple(content["task"]["names"])}),
            ColumnLayout(tuple(content["columns"]), blocks, categories, content.get("pixel_range")),
            None
            if vocabulary is None
            else Vocabulary(tuple(vocabulary["words"]), vocabulary["buckets"]),
            {name: Examples(**columns) for name, columns in content["public"].items()},
        )

    def content_hash(self) -> str:
        """Return the SHA-256 hash of the public sets, which equals `FederatedData.public_hash`."""
        shares = [
            (name, RowSelection.all_rows(examples))
            for name, examples in sorted(self.public.items())
        ]
        return fingerprint((self.task.kind, self.task.outputs), shares)

    def data_of_client(
        self, client: str, config: DataConfig, clients: Mapping[str, ClientSettings], seed: int
    ) -> FederatedData:
        """Load the rows of a client from the client's source, and add the public sets.

        Args:
            client: Client id.
            config: Data configuration.
            clients: Client settings, keyed by client id.
            seed: Seed of the run.

        Returns:
            The data of the federation, in which only this client has rows.

        Raises:
            UserError: If the client has no source, or the source does not match the public sets.
        """
        source = clients[client].data
        if source is None:
            raise UserError("data: missing; set the data file of this site")
        population = Population.from_settings(clients)
        common = Dataset(
            self.name,
            self.task,
            self.public["common_test"],
            columns=self.layout.columns,
            blocks=self.layout.blocks,
            vocabulary=self.vocabulary,
            categories=self.layout.categories,
            pixel_range=self.layout.pixel_range or MAX_BYTE,
        )
        owned = load_client_sources({source: [client]}, common, config, population, seed)
        private = ClientRows(owned.private)
        public = {name: RowSelection.all_rows(examples) for name, examples in self.public.items()}
        notes = check_missing_values(
            [population.profile(client)], population, private, public, layout=self.layout
        )
        pixels = choose_range(common, config, private, public)
        return FederatedData(
            self.task,
            self.name,
            population,
            private,
            public,
            seed=seed,
            simulated=self.simulated or owned.simulated,
            about=self.about,
            notes=[*owned.notes, *notes, *pixels.notes],
            layout=replace(self.layout, pixel_range=pixels.value),
            vocabulary=self.vocabulary,
        )


def _public_columns(examples: Examples) -> dict[str, Any]:
    """Return all columns of public examples except groups and patients."""
    columns = {
        "x": read_all(examples.x),
        "y": examples.y,
        "time": examples.time,
        "unit": examples.unit,
        "excluded": examples.excluded,
    }
    return {n: c for n, c in columns.items() if c is not None} | {
        "baselines": dict(examples.baselines)
    }
