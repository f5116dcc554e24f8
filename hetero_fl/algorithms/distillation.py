"""Base classes of methods that distill on a proxy set.

The classes select proxy rows, compute a teacher from clients' predictions, align and sharpen the
teacher, and create distillation steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from typing_extensions import override

from hetero_fl.aggregation.teachers import (
    Sharpening,
    TeacherKind,
    align_to_labels,
    proxy_predictions,
    sharpen,
)
from hetero_fl.aggregation.uploads import Uploads
from hetero_fl.algorithms.base import STUDENT, Algorithm, Needs
from hetero_fl.algorithms.prediction import (
    model_rows,
    proxy_sample,
    recalibrated_tensors,
    recalibrates,
    subtract_log_prior,
)
from hetero_fl.algorithms.round_parts import Items, local_fit, may_share
from hetero_fl.config.clients import ClientSettings
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.objectives import Objective, ProxyReplay, TeacherDistillation, log_prior
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.payload import Item, ItemSpec, Payload
from hetero_fl.core.plan import Fit, Plan, Predict, Rows, SampledBatches
from hetero_fl.core.task import Task
from hetero_fl.utils.seeding import keyed_generator

TEACHER = "teacher"
# Name of the item with the index of the round in which the teacher's proxy rows were sampled.
PROXY_INDICES = "proxy_indices"


class ProxyTraining(Algorithm):
    """Base class of methods that distill a teacher on the proxy set (Hinton et al. 2015).

    The loss is the mean of KL(softmax(z_teacher/T) ‖ softmax(z/T))·T² over the batch, and the
    teacher is constant. The setting `data.proxy` reserves rows of the training set as the proxy set
    or names another data set. With D proxy rows and C classes, predictions require 4·D·C bytes per
    client and round in each direction, regardless of the model size.

    With `proxy_rows`, each round uses a sample of the proxy set. Server and clients draw the same
    sample from equally seeded generators, so indices are not sent. A teacher from an earlier round
    is distilled on the proxy rows that were sampled in the earlier round.

    The setting `server.model: NAME` adds a student of any architecture to the server. In each
    round, the server distills the consensus of the clients into the student on the proxy set for
    `student_epochs` epochs. Reports list the results of the student as `server`. The parameters of
    the student are saved as `models/server.safetensors`.

    Example:
        >>> from hetero_fl.algorithms import ProxyTraining
        >>> sorted(ProxyTraining.downloads), ProxyTraining.needs.proxy_set
        (['proxy_indices', 'teacher'], 'required')
    """

    needs = Needs(proxy_set="required", shared_model=True)
    downloads = {
        TEACHER: ItemSpec(
            "rows", share="predictions", description="consensus logits of proxy rows, `[D, C]`"
        ),
        PROXY_INDICES: ItemSpec("rows", description="round in which `proxy_rows` were sampled"),
    }

    temperature: PositiveFloat = Field(2.0, description="temperature T of the softmax")
    proxy_rows: int | None = Field(
        None,
        ge=2,
        description="proxy rows sampled in each round; `null`: the whole proxy set",
    )
    proxy_batch_size: PositiveInt = Field(
        32, description="batch size on the proxy set, at clients and server"
    )
    student_epochs: PositiveInt = Field(
        2, description="epochs per round of the server's student on the proxy set"
    )

    def proxy_indices(
        self, participant: Participant, round_idx: int | None = None
    ) -> Tensor | None:
        """Return the indices of a round's proxy rows, int64 `[D]`, or None for all rows.

        Client and server draw the indices from equally seeded generators, so indices are not sent.

        Args:
            participant: The client or the server.
            round_idx: Index of the round. If None, the current round is used.
        """
        if self.proxy_rows is None:
            return None
        total = len(participant.data("proxy", None)["x"])
        if self.proxy_rows >= total:
            return None
        generator = keyed_generator(
            participant.round_context.seed,
            participant.round_context.round_idx if round_idx is None else round_idx,
            "proxy rows",
        )
        return torch.randperm(total, generator=generator)[: self.proxy_rows].sort().values

    def store_teacher(self, server: Participant, **content: object) -> None:
        """Store values, such as the teacher, in the server's state.

        If proxy rows are sampled in each round, the index of the round is stored as well.

        Args:
            server: The server.
            **content: The values, keyed by name.
        """
        server.state.update(content)
        if self.proxy_rows is not None:
            server.state[PROXY_INDICES] = torch.tensor([server.round_context.round_idx])

    @staticmethod
    def teacher_for(server: Participant, client_info: ClientInfo) -> Items:
        """Return the items to broadcast: the teacher, and the round in which its rows were sampled.

        The round is left out if the whole proxy set is used. The dictionary is empty before the
        first teacher exists and for clients without the proxy set.
        """
        if not client_info.has_proxy:
            return {}
        names = (TEACHER, PROXY_INDICES)
        return {name: server.state[name] for name in names if name in server.state}

    def teacher_rows(self, client: Participant, received: Payload) -> Tensor | None:
        """Return the indices of the proxy rows of a received teacher, or None for all rows."""
        if PROXY_INDICES not in received:
            return None
        return self.proxy_indices(client, int(received[PROXY_INDICES]))

    def predict_proxy(
        self, client: Participant, rows: Tensor | None, slot: str = "model"
    ) -> Plan[Tensor]:
        """Predict proxy rows with one of the client's models.

        The client's settings `recalibrate` and `prior_correction` apply.

        Args:
            client: The client.
            rows: Indices of the rows, int64 `[D]`. If None, all rows are predicted.
            slot: Slot of the model.

        Returns:
            Logits, shape `[D, C]`.
        """
        tensors = None
        if recalibrates(client.settings, "proxy_predictions"):
            sample = model_rows(client, slot, proxy_sample(client))
            tensors = yield from recalibrated_tensors(client, slot, sample)
        inputs = model_rows(client, slot, Rows("proxy", rows))
        logits = yield Predict(slot, inputs, tensors=tensors)
        return subtract_log_prior(client, logits)

    def distill(
        self,
        client: Participant,
        received: Payload,
        epochs: int,
        teacher: Tensor | None = None,
        *,
        slot: str = "model",
        objective: Objective | None = None,
    ) -> Fit:
        """Create the `Fit` step that distills the teacher into a client's model on the proxy set.

        Args:
            client: The client.
            received: Received items.
            epochs: Number of epochs.
            teacher: Logits of the teacher, shape `[D, C]`, which the objective uses as the column
                `teacher`. If None, the received logits are used.
            slot: Slot of the trained model, whose inputs are those of the client's own model.
            objective: Objective to minimize. If None, `TeacherDistillation`.
        """
        loss = objective or TeacherDistillation(client.task.kind, self.temperature, slot=slot)
        columns = {TEACHER: received[TEACHER] if teacher is None else teacher}
        return local_fit(
            client,
            loss,
            Rows("proxy", self.teacher_rows(client, received), extra_columns=columns),
            train={slot: None},
            epochs=epochs,
            batch_size=self.proxy_batch_size,
            label="digest",
        )

    def proxy_replay(
        self,
        client: Participant,
        received: Payload,
        weight: float = 1.0,
        teacher: Tensor | None = None,
        *,
        slot: str = "model",
        objective: Objective | None = None,
    ) -> Fit:
        """Create the `Fit` step of local training that also distills the teacher on proxy rows.

        Each optimizer step uses a random batch of proxy rows in addition to the client's own batch.

        Args:
            client: The client.
            received: Received items.
            weight: Weight of the distillation loss of `ProxyReplay`.
            teacher: Logits of the teacher, shape `[D, C]`. If None, the received logits are used.
            slot: Slot of the trained model, whose inputs are those of the client's own model.
            objective: Objective to minimize, which uses the columns `public_x` and
                `public_teacher`. If None, `ProxyReplay`.

        Returns:
            The step, which is local training alone if there is no teacher or its weight is 0.
        """
        has_teacher = teacher is not None or TEACHER in received
        if not has_teacher or (objective is None and weight == 0):
            return local_fit(client, train={slot: None})
        examples = Rows("proxy", self.teacher_rows(client, received)).columns(client)["x"]
        logits = received[TEACHER] if teacher is None else teacher

        def sample(generator: torch.Generator, size: int) -> Tensors:
            indices = torch.randint(len(examples), (size,), generator=generator)
            return {"x": examples[indices], TEACHER: logits[indices]}

        replay = ProxyReplay(client.task.kind, slot, weight=weight, temperature=self.temperature)
        batches = {"public": SampledBatches(sample, self.proxy_batch_size)}
        return local_fit(client, objective or replay, train={slot: None}, extra_batches=batches)

    def train_student(self, server: Participant, teacher: Tensor) -> Plan[None]:
        """Distill this round's teacher into the server's student, if the server has a student."""
        if STUDENT in server.models:
            yield self.server_fit(server, STUDENT, teacher, self.student_epochs)

    def server_fit(
        self,
        server: Participant,
        slot: str,
        teacher: Tensor,
        epochs: int,
        preprocess: object = None,
    ) -> Fit:
        """Create the `Fit` step that distills this round's teacher into one of the server's models.

        Args:
            server: The server.
            slot: Slot of the model. The student keeps its optimizer state between rounds.
            teacher: Logits of the round's proxy rows, shape `[D, C]`.
            epochs: Number of epochs.
            preprocess: Preprocessing of the rows. If None, the server's preprocessing is used.
        """
        rows = self.proxy_indices(server)
        return Fit(
            {slot: None},
            TeacherDistillation(server.task.kind, self.temperature, slot=slot),
            Rows("proxy", rows, extra_columns={TEACHER: teacher}, preprocess=preprocess),
            epochs=epochs,
            batch_size=self.proxy_batch_size,
            optimizer=server.optimizer,
            keep=STUDENT if slot == STUDENT else None,
            label=f"distil {slot}",  # style: ok (label of a random stream)
        )


class ProxyPredictions(ProxyTraining):
    """Base class of methods whose clients upload predictions on the round's proxy rows."""

    @override
    def train(self, client: Participant, received: Payload) -> Plan[Items]:
        items: Items = yield from super().train(client, received)
        return {**items, **(yield from self.upload_predictions(client))}

    def upload_predictions(self, client: Participant) -> Plan[Items]:
        """Predict the round's proxy rows and return the client's upload.

        The upload is empty if the client does not share predictions in this round.
        """
        if not may_share(client, "predictions"):
            return {}
        logits = yield from self.predict_proxy(client, self.proxy_indices(client))
        return self.prediction_items(client, logits)

    def prediction_items(self, client: Participant, logits: Tensor) -> Items:
        """Return the upload, given the logits of the client's model, shape `[D, C]`."""
        raise TypeError(f"{type(self).__name__} does not define prediction_items")


COUNTS = "counts"
# Degree to which a teacher is aligned with label frequencies.
Alignment = Annotated[float, Field(ge=0, le=1)]


def predicted_probabilities(task: Task, logits: Tensor) -> Tensor:
    """Return the softmax of logits for a multiclass task, otherwise the sigmoid."""
    return logits.softmax(-1) if task.kind == "multiclass" else logits.sigmoid()


def predicts_without_prior(settings: ClientSettings) -> bool:
    """Return whether the class prior does not affect a client's proxy predictions."""
    return bool(settings.logit_adjustment or settings.prior_correction)


# Entry of the server's state with the sum of all uploaded label counts.
LABELS = "labels"


class ProxyDistillation(ProxyPredictions):
    """Base class of methods whose teacher is the consensus of clients' predictions.

    The teacher is the weighted mean of the clients' logits. The setting `teacher` selects the
    weights: equal weights (`mean`), the number of rows n_k of client k (`samples`), exp(−entropy)
    of each prediction (`entropy`), or weights per class (`contrast`). With `contrast`, the values
    max(log p, −8) are averaged instead of the logits, with weights n_kc·(1 − n_kc/n_k) + 0.1, where
    client k has n_kc rows of class c. DS-FL averages probabilities instead of logits.

    With `align: λ`, the server adds λ·(log q_c − log p̄_c) to class c of the teacher, where q are
    the label frequencies of all uploads so far and p̄ is the teacher's mean prediction
    (`hetero_fl.aggregation.teachers.align_to_labels`). Without alignment, the consensus can lose
    classes that few clients have. Use alignment under label skew, if the classes of the proxy set
    are distributed like the classes of all clients together.

    With `sharpen`, the server then sharpens the class probabilities p of each proxy row: `era`
    (entropy reduction) computes softmax(p / T) (Itahara et al. 2020), and `power` computes
    p^β / Σ p^β (Azuma et al. 2025). Sharpening helps if the teacher ranks classes well but is
    uncertain, as after a mean over clients with few common classes. If the teacher is confident but
    wrong, sharpening increases the error. Predictions of regression tasks are not sharpened.

    Contrast weights and alignment use the label counts of clients whose `shares` contain
    `statistics`, in multiclass tasks only. For other clients, `contrast` assumes balanced classes.
    Label counts are private data and receive noise under `privacy`.

    Attributes:
        predictions: Declaration of the item with predictions, keyed by the name of the item.

    Example:
        >>> from hetero_fl.algorithms import ProxyDistillation
        >>> sorted(ProxyDistillation(align=0.5).uploads)
        ['counts', 'logits']
    """

    predictions: ClassVar[Mapping[str, ItemSpec]] = {
        "logits": ItemSpec("rows", private=True, share="predictions", prediction_type="logits")
    }

    teacher: TeacherKind = Field(
        "mean",
        description="weight of clients' predictions: equal, by samples, by contrast of each class, "
        "or by entropy of each prediction",
    )
    align: Alignment = Field(
        0.0,
        description="degree to which the teacher is aligned with label frequencies; 0 disables it",
    )
    sharpen: Sharpening = Field(
        "none", description="sharpening of the teacher: softmax(p/T), p^β/Σp^β, or none"
    )
    era_temperature: PositiveFloat = Field(
        0.1, description="temperature T of era; lower values sharpen more"
    )
    beta: PositiveFloat = Field(1.5, description="exponent β of power; 1 does not sharpen")

    @property
    def _broadcasts_means(self) -> bool:  # type: ignore[override]  # depends on a setting
        # An aligned teacher depends on the label counts of all rounds.
        return not self.align

    @property
    @override
    def uploads(self) -> Mapping[str, ItemSpec]:  # type: ignore[override]  # depends on settings
        """Declarations of the predictions, and of label counts if the teacher is aligned."""
        counts = ItemSpec("counts", private=True, share="statistics")
        return {**self.predictions, COUNTS: counts} if self.align else self.predictions

    def averages_logarithms(self, task: Task) -> bool:
        """Return whether the teacher is the contrast-weighted mean of log-probabilities."""
        return self.teacher == "contrast" and task.kind == "multiclass"

    @override
    def prediction_items(self, client: Participant, logits: Tensor) -> Items:
        (name,) = self.predictions
        return {name: self.weighted_predictions(client, logits), **self.label_counts(client)}

    def weighted_predictions(self, client: Participant, logits: Tensor) -> Item:
        """Return an item with a client's predictions and their weight in the teacher."""
        # Read label counts only if they are used, because reading them may spend privacy budget.
        uses_counts = self.averages_logarithms(client.task)
        shares_counts = "statistics" in client.settings.shares
        counts = client.counts if uses_counts and shares_counts else None
        return proxy_predictions(client.task, self.teacher, logits, counts, client.num_rows)

    def label_counts(self, client: Participant) -> Items:
        """Return the client's label counts as an item.

        The dictionary is empty if the teacher is not aligned, the task is not multiclass, or the
        client does not share statistics in this round.
        """
        is_used = bool(self.align) and client.task.kind == "multiclass"
        if not is_used or not may_share(client, "statistics"):
            return {}
        return {COUNTS: Item(client.counts, kind="counts")}

    @override
    def aggregate(self, server: Participant, uploads: Uploads) -> Plan[None]:
        # The models that sent predictions are those before the round's aggregation.
        mean = yield from self.mean_predictions(server, uploads)
        yield from super().aggregate(server, uploads)
        if mean is not None:
            teacher = self.teacher_from_mean(server, uploads, mean)
            self.store_teacher(server, teacher=teacher)
            yield from self.distill_at_server(server, uploads, teacher)

    def mean_predictions(self, server: Participant, uploads: Uploads) -> Plan[Tensor | None]:
        """Return the weighted mean of the predictions `[D, C]`, or None if there are none."""
        yield from ()
        (name,) = self.predictions
        return uploads.mean(name)

    def distill_at_server(
        self, server: Participant, uploads: Uploads, teacher: Tensor
    ) -> Plan[None]:
        """Distill the round's teacher into models of the server, by default into the student.

        Args:
            server: The server.
            uploads: Uploads of the round.
            teacher: Logits of the round's proxy rows, shape `[D, C]`.
        """
        yield from self.train_student(server, teacher)

    def teacher_from_mean(self, server: Participant, uploads: Uploads, mean: Tensor) -> Tensor:
        """Return the teacher, the aligned and sharpened mean.

        Args:
            server: The server.
            uploads: Uploads of the round.
            mean: Mean logits, shape `[D, C]`.

        Returns:
            Logits, shape `[D, C]`.
        """
        teacher = self.align_teacher(server, uploads, mean)
        if self.sharpen == "none" or server.task.kind == "regression":
            return teacher
        return self.sharpened_logits(server.task, predicted_probabilities(server.task, teacher))

    def sharpened_logits(self, task: Task, p: Tensor) -> Tensor:
        """Sharpen probabilities, shape `[D, C]`, and return their logits."""
        strength = self.era_temperature if self.sharpen == "era" else self.beta
        return sharpen(task, p, self.sharpen, strength)

    def align_teacher(self, server: Participant, uploads: Uploads, teacher: Tensor) -> Tensor:
        """Align the teacher with the labels of all uploads so far, if `align` is set.

        Label counts are accumulated over all rounds, because a small cohort may lack a class.

        Args:
            server: The server.
            uploads: Uploads of the round.
            teacher: Mean logits, shape `[D, C]`.

        Returns:
            Aligned logits, shape `[D, C]`, or the unchanged logits if no label counts are
            available.
        """
        if self.align and uploads.is_available(COUNTS):
            server.state[LABELS] = uploads.total(COUNTS)[0] + server.state.get(LABELS, 0)
        if not self.align or LABELS not in server.state:
            return teacher
        # Noisy counts may be negative.
        log_q = log_prior(server.task, server.state[LABELS].clamp(min=0))
        if log_q is None:
            return teacher
        # These settings are equal for all clients, as `hetero_fl.experiment.compatibility` checks.
        balanced = predicts_without_prior(server.peers.main_profile.settings)
        return align_to_labels(teacher, log_q, self.align, balanced)
