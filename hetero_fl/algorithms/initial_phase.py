"""The initial phase: what a client trains by itself before its first round, once, where a method's authors have it."""

from __future__ import annotations

from pydantic import Field, PositiveInt

from hetero_fl.algorithms.distillation import OnProxy
from hetero_fl.algorithms.own_objective import own_objective
from hetero_fl.plan import Fit, Plan, Rows
from hetero_fl.state import Participant

DONE = "initial_phase"


class InitialPhase(OnProxy):
    """Methods whose clients can train before their first round: on labeled public rows, then on their own.

    A client does so when it first takes part, whichever round that is, and remembers it in its
    private state: the phase happens again only where nothing came of that round. A model that is
    evaluated before has not had it.
    """

    initial_phase: bool = Field(False, description="train before the first round in which a client takes part")
    initial_private_epochs: PositiveInt = Field(25, description="initial phase: epochs on the client's own rows")

    def initial_training(self, client: Participant, public_epochs: int = 0) -> Plan[None]:
        """Train a client that takes part for the first time, if the initial phase is on.

        Public rows have the task's loss without the client's label frequencies or class weights,
        which are those of its own rows.

        Args:
            client: Whose round it is.
            public_epochs: Epochs on the labeled proxy set; 0: it is left out.
        """
        if not self.initial_phase or DONE in client.state:
            return
        if public_epochs and client.has_proxy:
            yield Fit(
                {"model": None},
                own_objective(client.settings.objective, client.task),
                Rows("proxy"),
                epochs=public_epochs,
                batch_size=self.proxy_batch_size,
                optimizer=client.optimizer,
                label="initial public",
            )
        yield self.fit(client, epochs=self.initial_private_epochs, label="initial private")
        client.state[DONE] = True
