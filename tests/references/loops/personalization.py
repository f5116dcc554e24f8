"""Methods with personal models or personal parts of models."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from tests.references.loops.averaging import FedAvg, copied, near
from tests.references.loops.base import READ, floats, only, predicted


class FedBN(FedAvg):
    """BatchNorm stays with the client."""

    def is_local(self, arch: Any, name: str) -> bool:
        return name in arch.batch_norm_names


class FedPer(FedAvg):
    """The head stays with the client."""

    def is_local(self, arch: Any, name: str) -> bool:
        return name.startswith("head.")


class LGFedAvg(FedAvg):
    """The backbone stays with the client."""

    def is_local(self, arch: Any, name: str) -> bool:
        return name.startswith("backbone.")


class FedRep(FedPer):
    """Train the head first, then the backbone."""

    def local(self, i: int, module: nn.Module) -> None:
        self.train(i, only(module, "head."), label="head")
        self.train(i, only(module, "backbone."))


class FedBABU(FedPer):
    """Train only the backbone; a fine-tuned copy is evaluated."""

    def local(self, i: int, module: nn.Module) -> None:
        self.train(i, only(module, "backbone."))

    def tuned(self, i: int, module: nn.Module) -> nn.Module:
        label = "personalise"  # style: ok (random stream)
        epochs = self.cards[i].settings.fine_tune_epochs
        self.train(i, only(module, ""), label=label, epochs=epochs)
        return module


class Ditto(FedAvg):
    """A personal model in addition to the shared one."""

    def start(self) -> None:
        super().start()
        self.models = [deepcopy(self.modules[c.arch.spec_id]) for c in self.cards]

    def local(self, i: int, module: nn.Module) -> None:
        anchor = copied(floats(module))
        self.train(i, module)
        own = self.models[i]
        self.train(i, own, near(own, anchor, self.method.weight), label="personal")

    def read(self) -> None:
        predictions: dict[Any, Tensor] = {}
        for i, client_info in enumerate(self.cards):
            self.score(i, "test", predicted(self.models[i], self.data[i]["test"]["x"]))
            for name in READ[1:]:
                if (client_info.arch.spec_id, name) not in predictions:
                    predictions[client_info.arch.spec_id, name] = predicted(
                        self.received(i), self.data[i][name]["x"]
                    )
                self.score(i, name, predictions[client_info.arch.spec_id, name])
