"""Live modules: one per architecture and slot in a process, into which participants' tensors are loaded in turn."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hetero_fl.architecture import Architecture, Tensors
from hetero_fl.nets import Net
from hetero_fl.runtime.costs import channels_last
from model_zoo import Outputs, SplitModel


class Template:
    """A module whose tensors are overwritten, never replaced."""

    def __init__(self, arch: Architecture, device: torch.device, precision: str = "float32") -> None:
        with torch.random.fork_rng(devices=[]):
            self.module = arch.build().to(device)
        if precision == "bfloat16":
            _reduce(self.module, device)
        if channels_last(arch):
            self.module.to(memory_format=torch.channels_last)
        self.tensors: Mapping[str, Tensor] = self.module.state_dict()  # shares memory with the module
        self.parameters: Mapping[str, nn.Parameter] = dict(self.module.named_parameters())
        self._mode: bool | None = None  # not the module's own word: a model's `train` may do more than set it
        self.drops = any(isinstance(m, nn.Dropout) and m.p for m in self.module.modules())

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The module with these tensors in it. Raises KeyError if one is missing."""
        for name, mine in self.tensors.items():
            mine.copy_(tensors[name])
        return self.module

    def set_mode(self, training: bool) -> None:
        """Training or evaluation. Telling every layer takes half a millisecond, so they are told when it changes."""
        if self._mode is not training or self.module.training is not training:
            self.module.train(training)
            self._mode = training

    def copy_out(self) -> Tensors:
        """The module's tensors, in memory of their own; how they lie in the module is its own affair."""
        plain = torch.contiguous_format
        return {n: t.detach().to("cpu", copy=True, memory_format=plain) for n, t in self.tensors.items()}

    def net(self, tensors: Mapping[str, Tensor]) -> Net:
        """The module as a function of these tensors, its own left alone."""
        head = {n.removeprefix("head."): t for n, t in tensors.items() if n.startswith("head.")}
        return Net(
            lambda x: functional_call(self.module, dict(tensors), (x,)),
            lambda z: functional_call(self.module.head, head, (z,)),
            {n: tensors[n] for n in self.parameters},
        )


class Templates:
    """Templates by (architecture, slot): two slots of one fit need two modules."""

    def __init__(self, device: torch.device, precision: str = "float32") -> None:
        self.device, self.precision = device, precision
        self.forked = [device] if device.type == "cuda" else []  # devices whose generators a fit borrows
        self._made: dict[tuple[Architecture, str], Template] = {}

    def __call__(self, arch: Architecture, slot: str = "") -> Template:
        if (arch, slot) not in self._made:
            self._made[arch, slot] = Template(arch, self.device, self.precision)
        return self._made[arch, slot]


def _reduce(module: SplitModel, device: torch.device) -> None:
    """Let products be computed in bfloat16; parameters, losses and what comes out stay in float32."""
    forward = module.forward

    def mixed(x: Tensor) -> Outputs:
        with torch.autocast(device.type, torch.bfloat16):
            out = forward(x)
        return Outputs(out.logits.float(), out.features.float())

    module.forward = mixed  # type: ignore[method-assign]
