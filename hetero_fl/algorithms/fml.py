"""FML: mutual learning of each client's own model and a shared one."""

from __future__ import annotations

from pydantic import Field

from hetero_fl.algorithms.base import algorithm
from hetero_fl.algorithms.mentee import MENTEE, WithMentee
from hetero_fl.mutual import Mutual
from hetero_fl.payload import ItemSpec
from hetero_fl.plan import Fit
from hetero_fl.state import Participant


@algorithm("fml")
class FML(WithMentee):
    """Own model and a small shared one learn from the rows and from one another (KL, both ways); the shared one, the mentee, is
    averaged (Shen et al. 2020, Algorithm 1, there "meme model")."""

    uploads = {MENTEE: ItemSpec("params", across=True)}

    alpha: float = Field(0.5, ge=0, le=1, description="weight of the task for the own model, the rest is KL")
    beta: float = Field(0.5, ge=0, le=1, description="weight of the task for the mentee, the rest is KL")

    def together(self, client: Participant) -> Fit:
        shape = client.arch[MENTEE].input_shape
        return self.both(client, Mutual(client.task.kind, alpha=self.alpha, beta=self.beta, shape=shape))
