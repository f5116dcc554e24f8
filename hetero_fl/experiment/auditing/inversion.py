"""Gradient inversion attacks, which reconstruct training images from a client's upload.

The label is computed from the gradient of the head (iDLG, Zhao et al. 2020). If the first layer is
fully connected, its input is computed exactly (Phong et al. 2018; Geiping et al. 2020, proposition
3.1). Otherwise, an image is optimized until the direction of its gradient matches the direction of
the observed gradient (Geiping et al. 2020, equation 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.round_parts import upload_part
from hetero_fl.communication.protocol import Message
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.config.communication import ChannelConfig
from hetero_fl.core.model_spec import Tensors
from hetero_fl.core.objectives import Batch, Context, ModelView, ModelViews, Objective
from hetero_fl.core.participant import Participant, copy_tensors
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Fit, Plan, Rows, Step
from hetero_fl.core.task import Task
from hetero_fl.data import Dataset, Preprocess
from hetero_fl.data.federated_data import unprocessed_rows
from hetero_fl.engine.driver import advance_plan, translate_user_errors
from hetero_fl.experiment.preparation import PreparedRun, prepare
from hetero_fl.utils.errors import ArgumentError, RunFailedError
from hetero_fl.utils.seeding import Key, keyed_generator
from model_zoo import SplitModel
from model_zoo.module_state import load_state, state_tensors

MODEL = "model"
# Number of optimization steps and learning rate of the attack.
STEPS = 800
RATE = 0.1
# Weights of the total variation, one for each random initialization.
SMOOTH = (0.01, 0.05, 0.2)
# Cosine distance below which no further random initialization is tried.
ENOUGH = 1e-3
Protect = Callable[[Tensors], Tensors]
"""Type of functions that modify an update: the sent minus the received tensors, keyed by name."""
Json = dict[str, Any]


def psnr(found: Tensor, true: Tensor) -> float:
    """Compute the peak signal-to-noise ratio of an image in [0, 1], in dB and limited to 100 dB."""
    return float(-10 * (found - true).square().mean().clamp(min=1e-10).log10())


def ssim(found: Tensor, true: Tensor) -> float:
    """Compute the structural similarity of two images (Wang et al. 2004, equation 13).

    Args:
        found: An image in [0, 1], `[C, H, W]`.
        true: An image in [0, 1], `[C, H, W]`.

    Returns:
        The mean over all windows of 7 x 7 pixels, which is 1 for equal images. For smaller images,
        the shorter image side is used.
    """
    side = min(7, *true.shape[-2:])
    windows = torch.stack([found, true]).double().unfold(2, side, 1).unfold(3, side, 1).flatten(-2)
    a, b = windows
    mean_a, mean_b = windows.mean(-1)
    covariance = ((a - mean_a[..., None]) * b).sum(-1) / (side**2 - 1)
    c1 = 0.01**2
    c2 = 0.03**2
    same = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    total = (mean_a**2 + mean_b**2 + c1) * (a.var(-1) + b.var(-1) + c2)
    return float((same / total).mean())


@dataclass(frozen=True)
class ObservedUpload:
    """The information about one training step of a client that an attacker at the server has.

    Attributes:
        module: The model before the step, without dropout, because the attacker does not know which
            units were dropped. Tensors that are not in the broadcast have their initial values.
        gradient: Gradient of the loss with respect to the uploaded parameters, keyed by name.
        objective: The client's loss, which the attacker is assumed to know.
        context: Tensors that the loss uses in addition to the batch, keyed by name.
    """

    module: SplitModel
    gradient: Tensors
    objective: Objective
    context: Context

    def distance(self, x: Tensor, y: Tensor, create_graph: bool = False) -> Tensor:
        """Return the cosine distance between the gradient of an example and the observed gradient.

        Args:
            x: Input of the model, `[1, ...]`.
            y: Label, `[1]` or `[1, outputs]`.
            create_graph: Whether the result must be differentiable with respect to the input.

        Returns:
            1 minus the cosine similarity, as a scalar tensor.
        """
        models = ModelViews({MODEL: ModelView.from_module(self.module)})
        parameters = dict(self.module.named_parameters())
        gradients = torch.autograd.grad(
            self.objective.total_loss(models, Batch(x=x, y=y), self.context),
            [parameters[name] for name in self.gradient],
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        found = torch.cat([gradient.flatten() for gradient in gradients])
        observed = torch.cat([gradient.flatten() for gradient in self.gradient.values()])
        return 1 - F.cosine_similarity(found, observed, dim=0, eps=1e-12)


class SingleStepMethod:
    """Wrapper that limits the local training of a method to one step of SGD on one row.

    All attributes except `train` are delegated to the wrapped method.

    Args:
        method: The method to wrap.
        row: Index of the training row, int64 `[1]`.
        rate: Learning rate.

    Attributes:
        calls: For each call of `train`, the limited `Fit` steps that the method requested. The
            first call trains. A later call is a dry run without the data of the client.
    """

    def __init__(self, method: Algorithm, row: Tensor, rate: float) -> None:
        self.method = method
        self.row = row
        self.rate = rate
        self.calls: list[list[Fit]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def train(self, client: Participant, received: Payload) -> Plan[Any]:
        """Run local training of the method, limited to one SGD step on the private row."""
        plan = self.method.train(client, received)
        answer = None
        self.calls.append([])
        while True:
            try:
                requested = advance_plan(client, plan, answer)
            except StopIteration as stop:
                return stop.value
            if isinstance(requested, list):
                answer = yield [self._limit_step(step) for step in requested]
            else:
                answer = yield self._limit_step(requested)

    def _limit_step(self, step: Step) -> Step:
        rows = step.data if isinstance(step, Fit) else None
        if not isinstance(rows, Rows) or rows.name != "train":
            return step
        extra_columns = {name: column[self.row] for name, column in rows.extra_columns.items()}
        limited = replace(
            cast(Fit, step),
            data=replace(rows, rows=self.row, extra_columns=extra_columns),
            epochs=1,
            steps=1,
            batch_size=1,
            augment=None,
            anneal=False,
            keep=None,
            drift={},
            optimizer=OptimizerConfig(name="sgd", lr=self.rate),
        )
        self.calls[-1].append(limited)
        return limited


def reason_not_invertible(prepared: PreparedRun, client: str) -> str | None:
    """Return why images cannot be reconstructed from a client's upload, or None if they can be."""
    method = prepared.method
    client_info = prepared.federation.client_infos[client]
    spec = method.uploads.get(MODEL)
    shape = client_info.arch.input_shape
    sends = upload_part(method, client_info.settings, client_info.settings.share_every - 1) != ()
    if spec is None or spec.kind != "params" or not method.needs.counts_traffic or not sends:
        return (
            f"{prepared.name}: '{client}' uploads no model parameters, "
            "so there is no gradient to invert"
        )
    if len(shape) != 3:
        return (
            f"{prepared.data.name}: examples of '{client}' have shape {shape}; "
            "inversion needs images"
        )
    return None


@translate_user_errors()
def observe_upload(
    prepared: PreparedRun, client: str, row: Tensor, protect: Protect | None = None
) -> ObservedUpload:
    """Run one training step of a client on one row and return what the server observes.

    The step is run in the first round in which the client uploads. Compression, differential
    privacy and secure aggregation are applied as configured.

    Args:
        prepared: The run.
        client: Client id.
        row: Index of the training row, int64 `[1]`.
        protect: Function that additionally modifies the update, which contains the sent minus the
            received tensors. If None, the update is not modified.

    Raises:
        UserError: If the upload does not depend on the training step.
        RunFailedError: If the client sends no upload.
    """
    client_info = prepared.federation.client_infos[client]
    rate = client_info.settings.optimizer.lr
    index = client_info.settings.share_every - 1
    method = SingleStepMethod(prepared.method, row, rate)
    runtime = prepared.config.runtime.model_copy(
        update={"executor": "serial", "device": "cpu", "precision": "float32"}
    )
    config = prepared.config.model_copy(update={"runtime": runtime})
    trainer = replace(prepared, config=config, method=cast(Algorithm, method)).make_trainer()
    link = trainer.link
    try:
        prepared.start.load_into(trainer)
        trainer.set_round(index)
        payload = link.broadcast(client_info)
        received = link.received(payload)
        request = Message("train", link.content(payload), index)
        (arrival,) = trainer.executor.run([client], lambda _: request)
        if not isinstance(arrival.reply, Message):
            raise RunFailedError(f"round {index + 1}: {client} sent no upload: {arrival.reply}")
        sent = link.decode_upload(client_info, arrival.reply.content, received, index)
    finally:
        trainer.executor.close()
    fits = [fit for fit in method.calls[0] if MODEL in fit.train]
    if MODEL not in sent or not fits:
        raise ArgumentError(
            f"clients: '{client}' uploads no result of training on its rows with {prepared.name}"
        )
    before = copy_tensors(prepared.federation.initial_tensors(client_info.arch))
    before |= received.get(MODEL, {})
    update = {
        name: tensor - before[name]
        for name, tensor in sent[MODEL].items()
        if name in client_info.arch.parameter_names
    }
    if protect is not None:
        update = protect(update)
    if not any(bool(change.any()) for change in update.values()):
        raise ArgumentError(
            f"clients: '{client}': the update is all zeros, so the upload reveals nothing"
        )
    module = client_info.arch.build()
    load_state(module, {**state_tensors(module), **before})
    module.train()
    for layer in module.modules():
        if isinstance(layer, nn.modules.dropout._DropoutNd):
            layer.eval()
    gradient = {name: -change / rate for name, change in update.items()}
    return ObservedUpload(module, gradient, fits[-1].objective, fits[-1].context)


def descend(
    distance: Callable[[Tensor, bool], Tensor],
    start: Tensor,
    smooth: float = SMOOTH[0],
    steps: int = STEPS,
) -> Tensor:
    """Minimize the sum of the gradient distance and the weighted total variation.

    The optimizer is Adam on the sign of the gradient, and the learning rate is reduced three times
    (Geiping et al. 2020, section 5).

    Args:
        distance: Function that returns the gradient distance of an image. The second argument is
            whether the result must be differentiable.
        start: Initial image in [0, 1], `[1, C, H, W]`.
        smooth: Weight of the total variation.
        steps: Number of optimization steps.

    Returns:
        The image with the lowest sum, in [0, 1], `[1, C, H, W]`.
    """
    pixels = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([pixels], lr=RATE)
    marks = [int(steps * part) for part in (3 / 8, 5 / 8, 7 / 8)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, marks, gamma=0.1)
    best = start
    least = math.inf
    for _ in range(steps):
        cost = distance(pixels, True) + smooth * total_variation(pixels)
        if float(cost.detach()) < least:
            best = pixels.detach().clone()
            least = float(cost.detach())
        (gradient,) = torch.autograd.grad(cost, [pixels])
        pixels.grad = gradient.sign()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            pixels.clamp_(0, 1)
    return best


def reconstruct(
    upload: ObservedUpload,
    label: Tensor,
    pixel_range: tuple[Tensor, Tensor],
    *key: Key,
    steps: int = STEPS,
) -> tuple[Tensor, float]:
    """Reconstruct the image from several random initializations and return the best result.

    Each initialization is combined with a different weight of the total variation, because the
    smoothness of the image is unknown. If the first layer of the model is fully connected, the
    image is also computed from the gradient of this layer.

    Args:
        upload: What the attacker observes.
        label: Label of the image, `[1]` or `[1, outputs]`.
        pixel_range: Inputs of the model for a black and a white image, `[1, C, H, W]` each.
        *key: Strings and integers that seed the random initialization.
        steps: Number of optimization steps for each initialization.

    Returns:
        The image in [0, 1], `[1, C, H, W]`, and its gradient distance.
    """
    low, high = pixel_range

    def distance(pixels: Tensor, create_graph: bool = False) -> Tensor:
        return upload.distance(low + pixels * (high - low), label, create_graph)

    found: list[tuple[float, Tensor]] = []
    exact = first_layer_input(upload)
    if exact is not None:
        pixels = ((exact.reshape(low.shape) - low) / (high - low)).clamp(0, 1)
        found.append((float(distance(pixels)), pixels))
    for smooth in SMOOTH:
        if found and min(found, key=lambda f: f[0])[0] < ENOUGH:
            break
        start = torch.rand(low.shape, generator=keyed_generator(*key, str(smooth)))
        pixels = descend(distance, start, smooth, steps)
        found.append((float(distance(pixels)), pixels))
    least, best = min(found, key=lambda f: f[0])
    return best, least


def read_label(upload: ObservedUpload, task: Task) -> Tensor | None:
    """Compute the label of the example from the gradient of the head's bias.

    The gradient of the cross-entropy with respect to the bias is p - y, which is negative only for
    the true classes.

    Args:
        upload: What the attacker observes.
        task: The task of the model.

    Returns:
        The class index, `[1]`, or the labels of a multilabel task, `[1, outputs]`. The result is
        None for regression, and if the upload does not contain the bias of the head.
    """
    biases = [
        gradient
        for name, gradient in upload.gradient.items()
        if name.startswith("head.") and tuple(gradient.shape) == (task.outputs,)
    ]
    if task.kind == "regression" or not biases:
        return None
    if task.kind == "multiclass":
        return biases[-1].argmin()[None]
    return (biases[-1] < 0)[None].to(biases[-1].dtype)


def first_layer_input(upload: ObservedUpload) -> Tensor | None:
    """Compute the input of a model from the gradient of its fully connected first layer.

    For a single example and any output neuron of the layer, the input equals the gradient of the
    neuron's weights divided by the gradient of the neuron's bias.

    Args:
        upload: What the attacker observes.

    Returns:
        The flattened input, or None if the first layer is not fully connected or the gradient of
        the layer is missing or zero.
    """
    layers = upload.module.named_modules()
    name, layer = next(
        (n, m) for n, m in layers if next(m.parameters(recurse=False), None) is not None
    )
    weight = upload.gradient.get(f"{name}.weight")
    bias = upload.gradient.get(f"{name}.bias")
    if not isinstance(layer, nn.Linear) or weight is None or bias is None or not bool(bias.any()):
        return None
    unit = int(bias.abs().argmax())
    return weight[unit] / bias[unit]


def total_variation(pixels: Tensor) -> Tensor:
    """Compute the total variation of an image, averaged over pixels.

    Args:
        pixels: An image, `[1, C, H, W]`.

    Returns:
        The mean absolute difference between horizontal neighbors plus the mean absolute difference
        between vertical neighbors, as a scalar tensor.
    """
    return (pixels.diff(dim=-1).abs().mean() + pixels.diff(dim=-2).abs().mean()).nan_to_num()


def attack_uploads(
    prepared: PreparedRun,
    clients: Sequence[str],
    *,
    images: int,
    seed: int,
    protect: Protect | None,
    dataset: Dataset | None,
    notes: list[str],
    log: Callable[[str], None],
) -> tuple[list[Json], list[Json]]:
    """Reconstruct images from uploads of clients.

    Clients whose uploads cannot be inverted are skipped. If the run protects uploads, they are also
    inverted without protection. If the server receives only sums, only uploads without protection
    are inverted.

    Args:
        prepared: The run.
        clients: Ids of the clients to attack.
        images: Number of training steps to invert for each client, each on one image.
        seed: Seed of the audit.
        protect: Function that modifies an update. If not None, the result is a further variant.
        dataset: The data set in memory that the run was trained on, or None.
        notes: List to which remarks about the results are appended.
        log: Function that is called with each line of progress.

    Returns:
        The scores, one dictionary for each client, training step and variant, and the images, one
        dictionary for each client and training step (see `invert`).
    """
    defaults = {"channel": ChannelConfig(), "privacy": None}
    unprotected = prepared.config.model_copy(update=defaults)
    ways: dict[str, tuple[PreparedRun, Protect | None]] = {"as trained": (prepared, None)}
    if unprotected != prepared.config:
        ways = {"without protection": (prepare(unprotected, dataset=dataset), None), **ways}
    if summed := prepared.config.channel.summed:
        del ways["as trained"]
        notes.append(
            f"channel.{summed}: the server does not see single uploads; the results show what an "
            "upload would reveal without it"
        )
    elif protect is not None:
        ways["with protect"] = (prepared, protect)
    scores: list[Json] = []
    pictures: list[Json] = []
    for client in clients:
        if reason := reason_not_invertible(prepared, client):
            notes.append(reason)
            continue
        of_client = invert(ways, client, images=images, seed=seed, log=log)
        scores += of_client[0]
        pictures += of_client[1]
    return scores, pictures


def invert(
    ways: Mapping[str, tuple[PreparedRun, Protect | None]],
    client: str,
    *,
    images: int,
    seed: int,
    log: Callable[[str], None],
) -> tuple[list[Json], list[Json]]:
    """Attack several training steps of a client, each on one image.

    If possible, the label is computed from the upload. Otherwise, the attacker is assumed to know
    it. The blind guess, which uses no upload, is the mean image of the global test set.

    Args:
        ways: Variants of the attack, keyed by name. Each variant is a prepared run and a function
            that modifies the update, or None instead of the function.
        client: Client id.
        images: Number of training steps to invert.
        seed: Seed of the audit.
        log: Function that is called with each line of progress.

    Returns:
        The scores, one dictionary for the blind guess and each variant of each step, and the
        images, one dictionary for each step with the keys `client`, `step` and `images`: the
        original under "original", and the reconstructions, keyed by variant. Images are in [0, 1],
        `[C, H, W]`.
    """
    prepared, _ = next(iter(ways.values()))
    preprocess = prepared.federation.client_infos[client].preprocess
    train = prepared.data.columns(client, "train", preprocess)
    low, high = _pixel_range(unprocessed_rows(prepared.data, client, ["train"]).x, preprocess)
    common_test = prepared.data.columns(client, "common_test", preprocess)["x"]
    blind = ((common_test.mean(0) - low) / (high - low))[0]
    scores = []
    pictures = []
    for number in range(images):
        draws = keyed_generator("audit", seed, "inversion", client, number)
        row = torch.randperm(len(train["y"]), generator=draws)[:1]
        true = ((train["x"][row] - low) / (high - low))[0]
        y = train["y"][row]
        picture = {"original": true}
        step = {"client": client, "step": number + 1}
        scores.append(
            {**step, "way": "blind", "psnr": psnr(blind, true), "ssim": ssim(blind, true)}
        )
        for way, (variant, protect) in ways.items():
            upload = observe_upload(variant, client, row, protect)
            label = read_label(upload, prepared.data.task)
            known = y if label is None else label
            key = ("audit", seed, "start", client, number)
            best, distance = reconstruct(upload, known, (low, high), *key)
            picture[way] = best[0]
            result = {
                "psnr": psnr(best[0], true),
                "ssim": ssim(best[0], true),
                "distance": distance,
                "label": _label_source(label, y),
            }
            scores.append({**step, "way": way, **result})
            log(f"{client}, step {number + 1} of {images}, {way}: PSNR {result['psnr']:.1f} dB")
        pictures.append({**step, "images": picture})
    return scores, pictures


def _label_source(found: Tensor | None, true: Tensor) -> str:
    if found is None:
        return "known"
    return "read" if bool((found == true).all()) else "misread"


def _pixel_range(x: Tensor, preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    """Apply a client's preprocessing to a black and a white image, `[1, C, H, W]` each."""
    white = max(1.0, float(x.max())) if x.is_floating_point() else preprocess.pixel_range or 255
    black = min(0.0, float(x.min()))
    return preprocess(torch.full_like(x[:1], black)), preprocess(torch.full_like(x[:1], white))
