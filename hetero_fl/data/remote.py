"""Data whose rows stay on other machines, and the public sets encoded as bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hetero_fl.config.clients import ClientSettings
from hetero_fl.config.data import DataConfig
from hetero_fl.config.population import Population
from hetero_fl.core.task import Task
from hetero_fl.data.client_rows import ClientRows, RemoteDataInfo, fingerprint
from hetero_fl.data.dataset import Block, ColumnLayout, Dataset, Examples, RowSelection, Vocabulary
from hetero_fl.data.external import load_client_sources
from hetero_fl.data.federated_data import PRIVATE, FederatedData
from hetero_fl.data.preprocessing import check_missing_values
from hetero_fl.utils.errors import UserError
from hetero_fl.utils.serialization import decode, encode

# Data of a federation whose participants are on machines of their own: each has its rows, and what
# the others told of theirs.


def describe_client_rows(
    data: FederatedData, client: str, send_view: bool, labels: bool
) -> RemoteDataInfo:
    """What a client says of its rows to those who do not have them.

    Args:
        send_view: whether its preprocessing depends on them (`normalize: own`), and so has to be told.
        labels: whether it tells how often each label occurs in its training rows.
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
    """The data as one client has it on its own machine, or the server (None): of everybody else only what they told.

    Raises KeyError for a client of whom nothing is told.
    """
    own = {client: data.client_rows[client]} if client is not None else {}
    others = {id: remote_info[id] for id in data.client_ids if id not in own}
    return data.with_rows(ClientRows(own, remote_info=others))


# The public sets of a federation as bytes, for participants that do not have the data set that they
# come from.
#
# Only what is public is in it: the proxy set (as a rule without labels), the common validation and
# test sets, and what the task is.

FORM = "public sets 1"


@dataclass(frozen=True)
class PublicPack:
    """Public sets, and what they are sets of."""

    name: str
    about: str
    simulated: bool
    task: Task
    layout: ColumnLayout
    vocabulary: Vocabulary | None
    public: Mapping[str, Examples]

    @classmethod
    def from_data(cls, data: FederatedData) -> PublicPack:
        """Those of a federation."""
        public = {name: share.copy_rows() for name, share in data.public_sets.items()}
        return cls(
            data.name, data.about, data.simulated, data.task, data.layout, data.vocabulary, public
        )

    def encode(self) -> bytes:
        """Its bytes, without pickle."""
        words = self.vocabulary
        return encode(
            {
                "name": self.name, "about": self.about, "simulated": self.simulated, "task": vars(self.task),
                "columns": self.layout.columns, "categories": self.layout.categories,
                "blocks": [[b.name, b.shape] for b in self.layout.blocks],
                "vocabulary": None if words is None else {"words": words.words, "buckets": words.buckets},
                "public": {name: _public_columns(examples) for name, examples in self.public.items()},
            },
            FORM,
        )  # fmt: skip

    @classmethod
    def decode(cls, data: bytes) -> PublicPack:
        """The reverse of `encode`. Raises CodecError."""
        tree = decode(data, FORM)
        blocks = tuple(Block(name, tuple(shape)) for name, shape in tree["blocks"])
        words = tree["vocabulary"]
        return cls(
            tree["name"], tree["about"], tree["simulated"],
            Task(**{**tree["task"], "names": tuple(tree["task"]["names"])}),
            ColumnLayout(tuple(tree["columns"]), blocks, tuple((c, tuple(v)) for c, v in tree.get("categories", ()))),
            None if words is None else Vocabulary(tuple(words["words"]), words["buckets"]),
            {name: Examples(**columns) for name, columns in tree["public"].items()},
        )  # fmt: skip

    def content_hash(self) -> str:
        """What `FederatedData.public_hash` says of the same sets."""
        shares = [
            (name, RowSelection.all_rows(examples))
            for name, examples in sorted(self.public.items())
        ]
        return fingerprint((self.task.kind, self.task.outputs), shares)

    def data_of_client(
        self, client: str, config: DataConfig, clients: Mapping[str, ClientSettings], seed: int
    ) -> FederatedData:
        """The data as a client has it that brings its own source (its setting `data`) to these public sets.

        Raises UserError for a source that does not match them.
        """
        source = clients[client].data
        if source is None:
            raise UserError("data: name this site's own file")
        population = Population.from_settings(clients)
        some = self.public["common_test"]
        common = Dataset(self.name, self.task, some, columns=self.layout.columns, blocks=self.layout.blocks,
                         vocabulary=self.vocabulary, categories=self.layout.categories)  # fmt: skip
        owned = load_client_sources({source: [client]}, common, config, population, seed)
        private = ClientRows(owned.private)
        public = {name: RowSelection.all_rows(examples) for name, examples in self.public.items()}
        gaps = check_missing_values(
            [population.profile(client)], population, private, public, self.layout
        )
        return FederatedData(
            self.task, self.name, population, private, public, seed, self.simulated or owned.simulated, self.about,
            notes=[*owned.notes, *gaps], layout=self.layout, vocabulary=self.vocabulary,
        )  # fmt: skip


def _public_columns(examples: Examples) -> dict[str, Any]:
    """What of public examples others need: whose they were is left out."""
    columns = {"x": examples.x, "y": examples.y, "time": examples.time, "unit": examples.unit}
    return {n: c for n, c in columns.items() if c is not None} | {
        "baselines": dict(examples.baselines)
    }
