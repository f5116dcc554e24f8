"""Methods with personal models or personal parts of models."""

from __future__ import annotations

from copy import deepcopy

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tests.references.loops.averaging import FedAvg, FedProx
from tests.references.loops.base import copied, floats, only


class FedBN(FedAvg):
    """BatchNorm layers, or only their statistics, stay with the client."""

    def sends(self, i: int, name: str) -> bool:
        layer, _, kind = name.rpartition(".")
        is_norm = isinstance(self.modules[self.group(i)].get_submodule(layer), _BatchNorm)
        return not is_norm or (self.method.keep == "statistics" and not kind.startswith("running"))


class FedPer(FedAvg):
    """The head stays with the client."""

    own_models = True

    def sends(self, i: int, name: str) -> bool:
        return name.startswith("backbone.")


class LGFedAvg(FedAvg):
    """The backbone stays with the client."""

    def sends(self, i: int, name: str) -> bool:
        return name.startswith("head.")


class FedRep(FedPer):
    """Train the head first, then the backbone."""

    def local(self, i: int, module: nn.Module) -> None:
        s = self.method
        self.train(i, only(module, "head."), label="head", epochs=s.head_epochs)
        self.train(i, only(module, "backbone."), epochs=s.body_epochs)


class FedBABU(FedPer):
    """Train only the backbone; a fine-tuned copy is evaluated."""

    tuning = "personalise"  # style: ok (random stream)

    def local(self, i: int, module: nn.Module) -> None:
        self.train(i, only(module, "backbone."))

    def tuned(self, i: int, module: nn.Module) -> nn.Module:
        part = "" if self.method.finetune == "all" else "head."
        return super().tuned(i, only(module, part))


class Ditto(FedProx):
    """A personal model in addition to the shared one; clients start it in their first round."""

    def start(self) -> None:
        super().start()
        self.personal: dict[int, nn.Module] = {}

    def local(self, i: int, module: nn.Module) -> None:
        anchor = copied(floats(module))
        own = self.personal.setdefault(i, deepcopy(module))
        self.train(i, module)
        loss = self.near(i, own, anchor, self.method.weight)
        self.train(i, own, loss, label="personal", epochs=self.method.personal_epochs)

    def outputs(self, i: int, model: nn.Module, name: str) -> Tensor:
        own = self.personal.get(i, model) if name == "test" else model
        return super().outputs(i, own, name)
