"""FedGH: one head for all, trained at the server on the features of classes."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Items, algorithm
from hetero_fl.algorithms.fedtgp import each_mean
from hetero_fl.algorithms.width import CommonHead
from hetero_fl.architecture import Architecture
from hetero_fl.config.optimizer import OptimizerConfig
from hetero_fl.objectives import Supervised
from hetero_fl.payload import Item, ItemSpec, Payload
from hetero_fl.plan import ClassSums, Fit, Plan, Table
from hetero_fl.state import Card, Participant

HEAD = "head"


@algorithm("fedgh")
class FedGH(CommonHead):
    """Clients of any architecture train on their own rows from one head; the server trains that head to tell the classes of
    the mean features that each client sends (Yi et al. 2023, Algorithm 1).

    Clients upload sums of features and counts by class, taken after their local training. Each client's mean of a class
    is one example at the server, whatever its count.
    """

    shared = ()
    uploads = {"features": ItemSpec("class_sums", use="each", private=True, share="statistics")}
    tasks = ("multiclass",)

    server_epochs: PositiveInt = Field(100, description="epochs a round on the clients' class means, at the server")
    server_lr: PositiveFloat = Field(0.01, description="learning rate of SGD at the server")
    server_batch_size: PositiveInt = Field(10, description="class means a step, at the server")

    def start(self, server: Participant) -> None:
        server.arch[HEAD] = Architecture.of("linear", server.task.outputs, (self.feature_dim or 1,))
        server.models[HEAD] = server.arch[HEAD].initial(server.clock.seed)

    def broadcast(self, server: Participant, card: Card) -> Items:
        due = server.state.get("trained", False) and server.clock.round % card.settings.share_every == 0
        return {HEAD: server.models[HEAD]} if due else {}  # an untrained head would only undo what clients know

    def deploy(self, client: Participant, got: Payload) -> Plan[None]:
        if HEAD in got:
            client.load("model", got[HEAD])
        yield from ()

    def train(self, client: Participant, got: Payload) -> Plan[Items]:
        yield from self.deploy(client, got)
        yield self.fit(client)
        if not self.gives(client, "statistics"):
            return {}
        sums, counts = yield ClassSums("model", readout="features")
        return {"features": Item(sums, counts[:, None], "class_sums")}

    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        items = [u.payload.item("features") for u in uploads.having("features")]
        if not items:
            return
        means, has = each_mean(items)
        yield Fit(
            {HEAD: None},
            Supervised(slot=HEAD),
            Table({"x": means[has], "y": has.nonzero()[:, 1]}),
            epochs=self.server_epochs,
            batch_size=self.server_batch_size,
            optimizer=OptimizerConfig(name="sgd", lr=self.server_lr),
            label=HEAD,
        )
        server.state["trained"] = True
