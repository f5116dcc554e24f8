"""Gradient inversion attacks, which reconstruct training images from a client's upload.

The label is computed from the gradient of the head (iDLG, Zhao et al. 2020). If the first layer is
fully connected, its input is computed exactly (Phong et al. 2018; Geiping et al. 2020, proposition
3.1). Otherwise, images are optimized until the direction of their gradient matches the direction of
the observed gradient (Geiping et al. 2020, equation 4).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetero_fl.algorithms import Algorithm
from hetero_fl.algorithms.base import upload_part
from hetero_fl.config.base import OptimizerConfig
from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.objectives import Batch, Context, ModelView, ModelViews, Objective
from hetero_fl.core.participant import Participant, copy_tensors
from hetero_fl.core.payload import Payload
from hetero_fl.core.plan import Fit, Plan, Rows, Step
from hetero_fl.core.stored_rows import read_all, require_tensor, targets
from hetero_fl.data import Preprocess
from hetero_fl.data.federated_data import unprocessed_rows
from hetero_fl.experiment.preparation import PreparedRun
from hetero_fl.utils.errors import ArgumentError
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
Log = Callable[[str], None]


def image_similarity(found: Tensor, true: Tensor) -> dict[str, float]:
    """Compare reconstructed images with the original images.

    Args:
        found: Reconstructed images in [0, 1], `[B, C, H, W]`.
        true: Original images in [0, 1], `[B, C, H, W]`.

    Returns:
        The mean PSNR in dB under `psnr`, and the mean SSIM under `ssim`.
    """
    pairs = list(zip(found, true, strict=True))
    return {
        "psnr": sum(psnr(a, b) for a, b in pairs) / len(pairs),
        "ssim": sum(ssim(a, b) for a, b in pairs) / len(pairs),
    }


def psnr(found: Tensor, true: Tensor) -> float:
    """Compute the peak signal-to-noise ratio of images in [0, 1], in dB and limited to 100 dB."""
    return float(-10 * (found - true).square().mean().clamp(min=1e-10).log10())


def ssim(found: Tensor, true: Tensor, window: int = 7) -> float:
    """Compute the structural similarity of two images (Wang et al. 2004, equation 13).

    Args:
        found: An image in [0, 1], `[C, H, W]`.
        true: An image in [0, 1], `[C, H, W]`.
        window: Side length of the windows in pixels. For smaller images, the shorter image side is
            used.

    Returns:
        The mean over all windows, which is 1 for equal images.
    """
    window = min(window, *true.shape[-2:])
    a = found[None].double()
    b = true[None].double()

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, window, stride=1)

    def covariance(x: Tensor, y: Tensor) -> Tensor:
        return window**2 / (window**2 - 1) * (mean(x * y) - mean(x) * mean(y))

    c1 = 0.01**2
    c2 = 0.03**2
    same = (2 * mean(a) * mean(b) + c1) * (2 * covariance(a, b) + c2)
    total = (mean(a) ** 2 + mean(b) ** 2 + c1) * (covariance(a, a) + covariance(b, b) + c2)
    return float((same / total).mean())


def match_order(found: Tensor, true: Tensor) -> Tensor:
    """Reorder reconstructed images to match the original images.

    Reconstruction cannot determine the order of images, because the gradient of a batch does not
    depend on the order of its examples.

    Args:
        found: Reconstructed images, `[B, C, H, W]`.
        true: Original images, `[B, C, H, W]`.

    Returns:
        The reconstructed images in the order with the smallest squared error, `[B, C, H, W]`.
    """
    cost = (found[:, None] - true[None]).square().flatten(2).mean(2)
    orders = permutations(range(len(true)))
    best = min(orders, key=lambda order: float(sum(cost[i, j] for j, i in enumerate(order))))
    return found[list(best)]


@dataclass(frozen=True)
class ObservedUpload:
    """The information about one training step of a client that an attacker at the server has.

    Attributes:
        arch: Architecture of the client's model.
        model: Tensors of the model before the step, keyed by name. Tensors that are not in the
            broadcast have their initial values.
        gradient: Gradient of the loss with respect to the uploaded parameters, keyed by name.
        objective: The client's loss, which the attacker is assumed to know.
        context: Tensors that the loss uses in addition to the batch, keyed by name.
    """

    arch: ModelSpec
    model: Tensors
    gradient: Tensors
    objective: Objective
    context: Context


class SingleStepMethod:
    """Wrapper that limits the local training of a method to one step of SGD on fixed rows.

    All attributes except `train` are delegated to the wrapped method.

    Args:
        method: The method to wrap.
        rows: Indices of the training rows, int64 `[B]`.
        rate: Learning rate.

    Attributes:
        rounds: For each call of `train`, the limited `Fit` steps that the method requested. The
            first call may be a dry run.
    """

    def __init__(self, method: Algorithm, rows: Tensor, rate: float) -> None:
        self.method = method
        self.rows = rows
        self.rate = rate
        self.rounds: list[list[Fit]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def train(self, client: Participant, received: Payload) -> Plan[Any]:
        """Run local training of the method, limited to one SGD step on the private rows."""
        plan = self.method.train(client, received)
        answer = None
        self.rounds.append([])
        while True:
            try:
                requested = plan.send(answer)
            except StopIteration as stop:
                return stop.value
            if isinstance(requested, list):
                answer = yield [self._limit_step(step) for step in requested]
            else:
                answer = yield self._limit_step(requested)

    def _limit_step(self, step: Step) -> Step:
        if not (
            isinstance(step, Fit) and isinstance(step.data, Rows) and step.data.name == "train"
        ):
            return step
        extra_columns = {
            name: column[self.rows] for name, column in step.data.extra_columns.items()
        }
        limited = replace(
            step,
            data=replace(step.data, rows=self.rows, extra_columns=extra_columns),
            epochs=1,
            steps=1,
            batch_size=len(self.rows),
            augment=None,
            anneal=False,
            keep=None,
            drift={},
            optimizer=OptimizerConfig(name="sgd", lr=self.rate),
        )
        self.rounds[-1].append(limited)
        return limited


def reason_not_invertible(prepared: PreparedRun, client: str) -> str | None:
    """Return why images cannot be reconstructed from a client's upload.

    The result is None if reconstruction is possible.
    """
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
    if prepared.data.vocabulary is not None:
        return f"{prepared.data.name}: examples are tokens; inversion needs images"
    if len(shape) != 3:
        return (
            f"{prepared.data.name}: examples of '{client}' have shape {shape}; "
            "inversion needs images"
        )
    return None


def observe_upload(
    prepared: PreparedRun,
    client: str,
    rows: Tensor,
    protect: Protect | None = None,
) -> ObservedUpload:
    """Run one training step of a client and return what the server observes.

    The step is run in the first round in which the client uploads. Compression, differential
    privacy and secure aggregation are applied as configured.

    Args:
        prepared: The run.
        client: Client id.
        rows: Indices of the training rows, int64 `[B]`.
        protect: Function that additionally modifies the update, which contains the sent minus the
            received tensors. If None, the update is not modified.

    Raises:
        UserError: If the upload does not depend on the training step.
    """
    client_info = prepared.federation.client_infos[client]
    rate = client_info.settings.optimizer.lr
    index = client_info.settings.share_every - 1
    method = SingleStepMethod(prepared.method, rows, rate)
    runtime = prepared.config.runtime.model_copy(
        update={"executor": "serial", "device": "cpu", "precision": "float32"}
    )
    config = prepared.config.model_copy(update={"runtime": runtime})
    trainer = replace(prepared, config=config, method=cast(Algorithm, method)).make_trainer()
    try:
        prepared.start.load_into(trainer)
        received, sent = trainer.request_upload(client, index)
    finally:
        trainer.executor.close()
    fits = [fit for fit in method.rounds[0] if MODEL in fit.train]
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
    gradient = {name: -tensor / rate for name, tensor in update.items()}
    if not any(bool(g.any()) for g in gradient.values()):
        raise ArgumentError(
            f"clients: '{client}': the update is all zeros, so the upload reveals nothing"
        )
    return ObservedUpload(client_info.arch, before, gradient, fits[-1].objective, fits[-1].context)


class Inverter:
    """Reconstructs images from a gradient by gradient matching.

    Args:
        upload: What the attacker observes.
        labels: Labels of the images, `[B]` or `[B, outputs]`.
        to_input: Function that maps pixels in [0, 1], `[B, C, H, W]`, to inputs of the model.
    """

    def __init__(
        self, upload: ObservedUpload, labels: Tensor, to_input: Callable[[Tensor], Tensor]
    ) -> None:
        self.upload = upload
        self.labels = labels
        self.to_input = to_input
        self.module: SplitModel = upload.arch.build()
        load_state(self.module, {**state_tensors(self.module), **upload.model})
        self.module.train()
        for layer in self.module.modules():
            if isinstance(layer, nn.modules.dropout._DropoutNd):
                # The attacker does not know which units were dropped.
                layer.eval()
        named = dict(self.module.named_parameters())
        self.parameters = [named[n] for n in upload.gradient]
        self.target_gradient = torch.cat([g.flatten() for g in upload.gradient.values()])
        self.models = ModelViews({"model": ModelView.from_module(self.module)})

    def distance(self, pixels: Tensor, create_graph: bool = False) -> Tensor:
        """Return the cosine distance between the gradient of images and the observed gradient.

        Args:
            pixels: Images in [0, 1], `[B, C, H, W]`.
            create_graph: Whether the result must be differentiable with respect to the pixels.

        Returns:
            1 minus the cosine similarity, as a scalar tensor.
        """
        batch = Batch(x=self.to_input(pixels), y=self.labels)
        loss = self.upload.objective.total_loss(self.models, batch, self.upload.context)
        gradients = torch.autograd.grad(
            loss, self.parameters, create_graph=create_graph, allow_unused=True
        )
        flat = torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for g, p in zip(gradients, self.parameters, strict=True)
            ]
        )
        return 1 - F.cosine_similarity(flat, self.target_gradient, dim=0, eps=1e-12)

    def descend(self, start: Tensor, smooth: float = SMOOTH[0], steps: int = STEPS) -> Tensor:
        """Minimize the sum of the gradient distance and the weighted total variation.

        The optimizer is Adam on the sign of the gradient, and the learning rate is reduced three
        times (Geiping et al. 2020, section 5).

        Args:
            start: Initial images in [0, 1], `[B, C, H, W]`.
            smooth: Weight of the total variation.
            steps: Number of optimization steps.

        Returns:
            The images with the lowest sum, in [0, 1], `[B, C, H, W]`.
        """
        pixels = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([pixels], lr=RATE)
        marks = [int(steps * part) for part in (3 / 8, 5 / 8, 7 / 8)]
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, marks, gamma=0.1)
        best = start
        least = math.inf
        for _ in range(steps):
            cost = self.distance(pixels, create_graph=True) + smooth * total_variation(pixels)
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

    def invert_from_starts(
        self, shape: tuple[int, ...], *key: Key, steps: int = STEPS
    ) -> tuple[Tensor, float]:
        """Reconstruct images from several random initializations and return the best result.

        Each initialization is combined with a different weight of the total variation, because the
        smoothness of the images is unknown. If there is a single image and the first layer of the
        model is fully connected, the image is also computed from the gradient of this layer.

        Args:
            shape: Shape of an image, `(C, H, W)`.
            *key: Strings and integers that seed the random initialization.
            steps: Number of optimization steps for each initialization.

        Returns:
            Images in [0, 1], `[B, C, H, W]`, and the gradient distance of these images.
        """
        found: list[tuple[float, Tensor]] = []
        exact = (
            first_layer_input(self.module, self.upload.gradient) if len(self.labels) == 1 else None
        )
        if exact is not None:
            low = self.to_input(torch.zeros(1, *shape)).flatten()
            high = self.to_input(torch.ones(1, *shape)).flatten()
            pixels = ((exact - low) / (high - low)).reshape(1, *shape).clamp(0, 1)
            found.append((float(self.distance(pixels)), pixels))
        for smooth in SMOOTH:
            if found and min(found, key=lambda f: f[0])[0] < ENOUGH:
                break
            start = torch.rand(
                len(self.labels), *shape, generator=keyed_generator(*key, str(smooth))
            )
            pixels = self.descend(start, smooth, steps)
            found.append((float(self.distance(pixels)), pixels))
        least, best = min(found, key=lambda f: f[0])
        return best, least


def read_labels(upload: ObservedUpload, kind: str) -> Tensor | None:
    """Compute the label of a single example from the gradient of the head's bias.

    The gradient of the cross-entropy with respect to the bias is p - y, which is negative only for
    the true classes.

    Args:
        upload: What the attacker observes.
        kind: The kind of task: "multiclass", "multilabel" or "regression".

    Returns:
        The class index, `[1]`, or the labels of a multilabel task, `[1, outputs]`. The result is
        None for regression, and if the upload does not contain the bias of the head.
    """
    if kind == "regression":
        return None
    outputs = upload.arch.outputs
    biases = [
        g
        for n, g in upload.gradient.items()
        if n.startswith("head.") and tuple(g.shape) == (outputs,)
    ]
    if not biases:
        return None
    if kind == "multiclass":
        return biases[-1].argmin()[None]
    return (biases[-1] < 0)[None].to(biases[-1].dtype)


def first_layer_input(module: nn.Module, gradient: Tensors) -> Tensor | None:
    """Compute the input of a model from the gradient of its fully connected first layer.

    For a single example and any output neuron of the layer, the input equals the gradient of the
    neuron's weights divided by the gradient of the neuron's bias.

    Args:
        module: The model.
        gradient: Gradient for a single example, keyed by parameter name.

    Returns:
        The flattened input, or None if the first layer is not fully connected or the gradient of
        the layer is missing or zero.
    """
    first = next(
        (
            (n, m)
            for n, m in module.named_modules()
            if next(m.parameters(recurse=False), None) is not None
        ),
        None,
    )
    if first is None or not isinstance(first[1], nn.Linear):
        return None
    weight = gradient.get(f"{first[0]}.weight")
    bias = gradient.get(f"{first[0]}.bias")
    if weight is None or bias is None or not bool(bias.any()):
        return None
    unit = int(bias.abs().argmax())
    return weight[unit] / bias[unit]


def total_variation(pixels: Tensor) -> Tensor:
    """Compute the total variation of images, averaged over pixels.

    Args:
        pixels: Images, `[B, C, H, W]`.

    Returns:
        The mean absolute difference between horizontal neighbors plus the mean absolute difference
        between vertical neighbors, as a scalar tensor.
    """
    return (pixels.diff(dim=-1).abs().mean() + pixels.diff(dim=-2).abs().mean()).nan_to_num()


@dataclass(frozen=True)
class InvertedBatch:
    """Reconstructed images of one training step.

    Images are in [0, 1] and have the shape `[B, C, H, W]`.

    Attributes:
        true: The original images.
        found: The reconstructed images, keyed by variant of the attack.
        rows: Scores of each variant, and of the blind guess of an attacker who does not see the
            upload.
    """

    true: Tensor
    found: dict[str, Tensor]
    rows: list[dict[str, Any]]


def invert(
    ways: Mapping[str, tuple[PreparedRun, Protect | None]],
    client: str,
    *,
    images: int,
    batch: int,
    seed: int,
    log: Log,
) -> Iterator[InvertedBatch]:
    """Attack several training steps of a client and yield the reconstructed images.

    If possible, the label of a single image is computed from the upload. Otherwise, the attacker is
    assumed to know the labels. The blind guess is the mean image of the global test set.

    Args:
        ways: Variants of the attack, keyed by name. Each variant is a prepared run and a function
            that modifies the update, or None instead of the function.
        client: Client id.
        images: Number of training steps to invert.
        batch: Number of images in each training step.
        seed: Seed of the audit.
        log: Function that is called with each line of progress.

    Yields:
        The reconstructed images of one training step.
    """
    prepared, _ = next(iter(ways.values()))
    data = prepared.data
    preprocess = prepared.federation.client_infos[client].preprocess
    train = data.columns(client, "train", preprocess)
    raw = require_tensor(unprocessed_rows(data, client, ["train"]).x, "the inversion of updates")
    low, high = _value_range(raw, preprocess)
    mean_input = read_all(data.columns(client, "common_test", preprocess)["x"]).mean(
        0, keepdim=True
    )
    x = read_all(train["x"])
    y = targets(train)

    def to_pixels(x: Tensor) -> Tensor:
        return (x - low) / (high - low)

    def to_input(pixels: Tensor) -> Tensor:
        return low + pixels * (high - low)

    for number in range(images):
        rows = _draw_rows(y, batch, "audit", seed, "inversion", client, number)
        true = to_pixels(x[rows])
        true_labels = y[rows]
        blind = to_pixels(mean_input).expand(len(rows), -1, -1, -1)
        scores = [{"way": "blind", **image_similarity(blind, true)}]
        found = {}
        for way, (variant, protect) in ways.items():
            started = time.perf_counter()
            upload = observe_upload(variant, client, rows, protect)
            read = read_labels(upload, data.task.kind) if len(rows) == 1 else None
            inverter = Inverter(upload, true_labels if read is None else read, to_input)
            best, distance = inverter.invert_from_starts(
                tuple(true.shape[1:]), "audit", seed, "start", client, number
            )
            found[way] = match_order(best, true)
            scores.append(
                {
                    "way": way,
                    **image_similarity(found[way], true),
                    "distance": distance,
                    "label": _label_source(read, true_labels),
                    "seconds": time.perf_counter() - started,
                }
            )
            log(f"{client}, step {number + 1} of {images}, {way}: PSNR {scores[-1]['psnr']:.1f} dB")
        yield InvertedBatch(true, found, scores)


def _label_source(read: Tensor | None, true: Tensor) -> str:
    if read is None:
        return "known"
    return "read" if bool((read == true).all()) else "misread"


def _value_range(x: Tensor, preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    """Apply a client's preprocessing to a black and a white image, `[1, C, H, W]` each."""
    white = max(1.0, float(x.max())) if x.is_floating_point() else preprocess.pixel_range or 255
    black = min(0.0, float(x.min()))
    return preprocess(torch.full_like(x[:1], black)), preprocess(torch.full_like(x[:1], white))


def _draw_rows(y: Tensor, count: int, *key: Key) -> Tensor:
    """Return the indices of `count` random rows, from as many classes as possible."""
    order = torch.randperm(len(y), generator=keyed_generator(*key))
    if y.ndim > 1:
        return order[:count]
    # Choose the first row of each class, then the second row of each class, and so on.
    seen: Counter[float] = Counter()
    place_in_class = []
    for label in y[order].tolist():
        place_in_class.append(seen[label])
        seen[label] += 1
    return order[torch.tensor(place_in_class).argsort(stable=True)[:count]]
