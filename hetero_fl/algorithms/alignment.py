"""A teacher whose mean prediction is held to the label frequencies of the clients, so that no class is lost in the consensus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from hetero_fl.aggregation.teachers import aligned
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import Items
from hetero_fl.algorithms.distillation import Distilling
from hetero_fl.objectives import log_prior
from hetero_fl.payload import Item, ItemSpec
from hetero_fl.state import Participant

COUNTS = "counts"
LABELS = "labels"  # how many of each class there were in all uploads so far


class Aligning(Distilling):
    """Those that can align their teacher (`hetero_fl.aggregation.teachers.aligned`). Clients then send their label counts too,
    where labels exclude one another and `shares` has `statistics`."""

    align: float = Field(
        0.0, ge=0, le=1, description="how far the teacher moves towards the clients' label frequencies; 0: not at all"
    )

    def label_counts(self, use: Literal["sum", "each"] = "sum") -> Mapping[str, ItemSpec]:
        """What there is to declare besides what a method sends anyway."""
        return {COUNTS: ItemSpec("counts", use, private=True, share="statistics")} if self.align else {}

    def told_labels(self, client: Participant) -> Items:
        """The client's label counts, if the teacher is aligned and it lets them out; they go with what it says or is."""
        wanted = self.align > 0 and client.task.kind == "multiclass" and self.gives(client, "statistics")
        return {COUNTS: Item(client.counts, kind="counts")} if wanted else {}

    def moved(self, server: Participant, uploads: Uploads, teacher: Tensor) -> Tensor:
        """The teacher, aligned to the labels of all uploads so far: those of one small cohort may lack a class."""
        if self.align and uploads.heard_of(COUNTS):
            server.state[LABELS] = uploads.total(COUNTS)[0] + server.state.get(LABELS, 0)
        if not self.align or LABELS not in server.state:
            return teacher
        log_q = log_prior(server.task, server.state[LABELS].clamp(min=0))  # noise may leave less than nought
        return teacher if log_q is None else aligned(teacher, log_q, self.align, self.logit_adjustment)
