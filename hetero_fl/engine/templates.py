"""Live modules by architecture, and their cost in operations and bytes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hetero_fl.core.model_spec import ModelSpec, Tensors
from hetero_fl.core.objectives import ModelView
from hetero_fl.core.participant import ClientInfo, Participant
from hetero_fl.core.plan import ClassSums, Predict
from hetero_fl.engine.device_memory import CPU, DeviceMemory
from hetero_fl.engine.dropout import DropoutStreams, use_keyed_dropout
from hetero_fl.utils.code_permission import OWN
from model_zoo import ModelDescription, Outputs, SplitModel, describe
from model_zoo.shapes import make_shape

# What a client's task costs, and which memory layout suits its model: estimated from what is known
# before the run.
#
# Estimates decide which executor a run gets, and are the same on every machine. Measured times only
# decide who is begun first, which changes no bit.

# floating-point operations a second of one core: turns estimates into about the measured times'
# unit
RATE = 2e10
INTENSE = 10  # operations on a parameter, for each example


@cache
def describe_model(arch: ModelSpec) -> ModelDescription:
    """Parameters and arithmetic of a model."""
    return describe(
        arch.name, *arch.size_arguments, vocabulary=arch.vocabulary, **dict(arch.options)
    )


def prefers_channels_last(arch: ModelSpec) -> bool:
    """Whether a model is faster with its channels innermost.

    On CPUs that takes 0.7 to 0.9 of the time for convolutions that use each weight at many places, and 1.2 to 1.4 for wide
    ones on images of a few pixels, such as ResNet-18's last blocks at 28x28. A user's own model stays as it is: a `view` of
    features in its code counts on the plain layout.
    """
    if arch.name.startswith(OWN):
        return False
    about = describe_model(arch)
    convolutional = 2 * about.convolution_flops >= about.forward_flops > 0
    return convolutional and about.forward_flops >= INTENSE * about.parameters


@cache
def is_recurrent(arch: ModelSpec) -> bool:
    """Whether a model has recurrent layers, for which there is no computing together."""
    with torch.random.fork_rng(devices=[]):
        return any(isinstance(m, nn.RNNBase) for m in arch.build().modules())


def training_flops(client_info: ClientInfo) -> float:
    """Return the floating-point operations of a client's local training in a round, about."""
    s = client_info.settings
    examples = client_info.num_rows * s.epochs if s.steps is None else s.steps * s.batch_size
    return float(examples * example_flops(client_info.arch))


def example_flops(arch: ModelSpec) -> int:
    """Return the operations of training on one example, about: forward, and twice that for gradients."""
    about = describe_model(arch)
    return 3 * max(about.forward_flops, 2 * about.parameters)


class TaskCosts:
    """Seconds a task takes, about."""

    def __init__(self, client_infos: Mapping[str, ClientInfo]) -> None:
        self._client_infos = client_infos
        self._measured: dict[str, float] = {}

    def cost_of(self, client: str) -> float:
        """As measured the last time, else as estimated."""
        return self._measured.get(client) or training_flops(self._client_infos[client]) / RATE

    def update(self, seconds: Mapping[str, float]) -> None:
        """What tasks took."""
        self._measured.update(seconds)


# Live modules: one per architecture and slot in a process, into which participants' tensors are
# loaded in turn.


class Template:
    """A module into which tensors are loaded, and that hands trained ones over without a copy."""

    def __init__(
        self,
        arch: ModelSpec,
        memory: DeviceMemory,
        precision: str = "float32",
        dropout: DropoutStreams | None = None,
    ) -> None:
        self.memory = memory
        device = memory.device
        with torch.random.fork_rng(devices=[]):
            self.module = arch.build().to(device)
        self.drops = use_keyed_dropout(self.module, dropout or DropoutStreams(device))
        if precision == "bfloat16":
            _use_bfloat16(self.module, device)
        if prefers_channels_last(arch):
            self.module.to(memory_format=torch.channels_last)
        # the module's own tensors
        self.tensors: Mapping[str, Tensor] = self.module.state_dict(keep_vars=True)
        self._handed_over: set[str] = set()
        # cuDNN wants the weights of a recurrent layer in one piece: others are given copies.
        self._keeps_memory = device.type == "cuda" and any(
            isinstance(m, nn.RNNBase) for m in self.module.modules()
        )
        self.parameters: Mapping[str, nn.Parameter] = dict(self.module.named_parameters())
        # not the module's own word: a model's `train` may do more than set it
        self._mode: bool | None = None

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The module with these tensors in it. Raises KeyError if one is missing."""
        for name, mine in self.tensors.items():
            if tensors[name] is mine:
                continue
            if name in self._handed_over:
                mine.data = torch.empty_like(mine)
                self._handed_over.discard(name)
            mine.copy_(self.memory.keep(tensors[name]))
        return self.module

    def set_mode(self, training: bool) -> None:
        """Training or evaluation. Telling every layer takes half a millisecond, so they are told when it changes."""
        if self._mode is not training or self.module.training is not training:
            self.module.train(training)
            self._mode = training

    def hand_over(self) -> Tensors:
        """Return the module's tensors, contiguous and on the storage device; when it is loaded again, it gets other memory."""
        # Unlike `detach()`, `data` does not count later changes of the module as changes of its own.
        tensors = {
            name: mine.data.to(
                self.memory.storage_device,
                copy=self._keeps_memory,
                memory_format=torch.contiguous_format,
            )
            for name, mine in self.tensors.items()
        }
        self._handed_over = {
            name for name, t in tensors.items() if t.data_ptr() == self.tensors[name].data_ptr()
        }
        return tensors

    def view_of(self, tensors: Mapping[str, Tensor]) -> ModelView:
        """The module as a function of these tensors, its own left alone."""
        head = {n.removeprefix("head."): t for n, t in tensors.items() if n.startswith("head.")}
        return ModelView(
            lambda x: functional_call(self.module, dict(tensors), (x,)),
            lambda z: functional_call(self.module.head, head, (z,)),
            {n: tensors[n] for n in self.parameters},
        )


class Templates:
    """Templates by (architecture, slot): two slots of one fit need two modules."""

    def __init__(self, memory: DeviceMemory, precision: str = "float32") -> None:
        self.memory = memory
        self.device = device = memory.device
        self.precision = precision
        # devices whose generators a fit borrows
        self.forked = [device] if device.type == "cuda" else []
        self.dropout = DropoutStreams(device)
        self._templates: dict[tuple[ModelSpec, str], Template] = {}

    def __call__(self, arch: ModelSpec, slot: str = "") -> Template:
        if (arch, slot) not in self._templates:
            self._templates[arch, slot] = Template(arch, self.memory, self.precision, self.dropout)
        return self._templates[arch, slot]


def _use_bfloat16(module: SplitModel, device: torch.device) -> None:
    """Let products be computed in bfloat16; parameters, losses and what comes out stay in float32."""
    forward = module.forward

    def mixed(x: Tensor) -> Outputs:
        with torch.autocast(device.type, torch.bfloat16):
            out = forward(x)
        return Outputs(out.logits.float(), out.features.float())

    module.forward = mixed  # type: ignore[method-assign]


MEASURED_SECONDS = 0.1  # after which no further step is timed
SLOW_STEP = 0.5  # seconds of a first step after which no second one is timed


def measure_step(arch: ModelSpec, batch_size: int, threads: int) -> float:
    """Return the seconds of a training step on this machine's processor.

    Forward, backward and a step of SGD on blank examples. The least of several, of which the first
    does not count; of a slow model, the first.

    Args:
        arch: The model.
        batch_size: Examples per step.
        threads: Threads that compute it.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    templates = Templates(DeviceMemory(CPU))
    template = templates(arch)
    template.set_mode(training=True)
    _, channels, size, _ = arch.size_arguments
    x = make_shape(channels, size, arch.vocabulary).blank(batch_size)
    optimizer = torch.optim.SGD(template.module.parameters(), lr=0.0, fused=True)
    seconds: list[float] = []
    try:
        with torch.random.fork_rng(devices=[]):
            while sum(seconds) < MEASURED_SECONDS or (len(seconds) == 1 and seconds[0] < SLOW_STEP):
                started = time.perf_counter()
                templates.dropout.seed([len(seconds)], batch_size)
                optimizer.zero_grad()
                template.module(x).logits.sum().backward()
                optimizer.step()
                seconds.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads_before)
    return min(seconds[1:] or seconds)


OutputStep = Predict | ClassSums


def step_model_spec(participant: Participant, step: OutputStep) -> ModelSpec:
    """Return the architecture of the model that a step computes with."""
    return getattr(step, "arch", None) or participant.arch[step.slot]


def step_tensors(participant: Participant, step: OutputStep) -> Mapping[str, Tensor]:
    """Return the tensors of that model: those in the step, or those in its slot."""
    sent: Mapping[str, Tensor] | None = getattr(step, "tensors", None)
    return participant.models[step.slot] if sent is None else sent
