"""FedMRL: features of a shared small model and of each client's own, one nested in the other."""

from __future__ import annotations

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from hetero_fl.algorithms.base import Algorithm, algorithm
from hetero_fl.algorithms.mentee import MENTEE, WithMentee
from hetero_fl.algorithms.width import need_linear_head
from hetero_fl.architecture import Architecture
from hetero_fl.errors import UserError
from hetero_fl.mutual import Nested, as_shape
from hetero_fl.payload import ItemSpec
from hetero_fl.plan import Fit, Plan, Predict, Rows, Table
from hetero_fl.state import Participant, Roster

PROJECTION = "projection"  # P: kept by the client


@algorithm("fedmrl")
class FedMRL(WithMentee):
    """A small shared network G beside each client's own F, trained on features of both, one nested in the other; G alone is
    averaged (Yi et al. 2024, Algorithm 1).

    G's features have width d₁, F's d₂ > d₁. A private linear projection takes both to width d₂, all of which goes to F's head
    and the first d₁ to G's; the loss is the sum of both.

    A client's model is all three: F's head on the projected features is what is read, at home and in common.
    """

    uploads = {MENTEE: ItemSpec("params", across=True)}
    requires = ("linear heads",)
    reads = "own head on projected features, as deployed with the next broadcast (the models saved are clients' own F alone)"

    own_weight: NonNegativeFloat = Field(1.0, description="m_F: weight of the own head's loss")
    mentee_weight: NonNegativeFloat = Field(1.0, description="m_G: weight of the mentee's head's loss")

    def resolve(self, cards: Roster) -> tuple[Algorithm, list[str]]:
        made, notes = super().resolve(cards)
        assert isinstance(made, FedMRL) and made.mentee is not None
        widths = {kind.first: kind.arch.width for kind in cards.kinds}
        for kind in cards.kinds:
            need_linear_head(kind.first, kind.arch)
        least = min(widths, key=widths.__getitem__)
        width = made.small(cards[least].arch).width
        if width < widths[least]:
            return made, notes
        if made.mentee.feature_dim or widths[least] < 2:
            key = "algorithm.mentee.feature_dim" if made.mentee.feature_dim else f"clients: {least}: model"
            raise UserError(
                f"{key}: the mentee's features have width {width}, those of {least} {widths[least]}, not more"
            )
        half = widths[least] // 2
        mentee = made.mentee.model_copy(update={"feature_dim": half})
        notes = [*notes, f"algorithm.mentee.feature_dim is {half}: less than the {widths[least]} of {least}"]
        return made.model_copy(update={"mentee": mentee}), notes

    def extras(self, arch: Architecture) -> dict[str, Architecture]:
        mentee = self.small(arch)
        return {MENTEE: mentee, PROJECTION: Architecture.of("linear", arch.width, (mentee.width + arch.width,))}

    def together(self, client: Participant) -> Fit:
        shape = client.arch[MENTEE].input_shape
        objective = Nested(client.task.kind, alpha=self.own_weight, beta=self.mentee_weight, shape=shape)
        return self.both(client, objective, projection=None)

    def predict(self, client: Participant, rows: Rows, home: bool) -> Plan[Tensor]:
        seen = as_shape(rows.columns(client)["x"], client.arch[MENTEE].input_shape)
        g = yield Predict(MENTEE, Table({"x": seen}), readout="features")
        f = yield Predict("model", rows, readout="features")
        r = yield Predict(PROJECTION, Table({"x": torch.cat([g, f], 1)}))
        own = client.models["model"]
        head = Architecture.of("linear", client.task.outputs, (r.shape[1],))
        tensors = {n: own[n] for n in ("head.weight", "head.bias")}
        logits = yield Predict("head", Table({"x": r}), tensors=tensors, arch=head)
        return self.with_prior(client, logits) if home else logits
