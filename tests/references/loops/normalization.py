"""FedNova: averages of changes, normalized by effective step counts."""

from __future__ import annotations

import torch

from tests.references.loops.averaging import FedAvg, copied
from tests.references.loops.base import BATCH, State, floats


class FedNova(FedAvg):
    """Changes divided by their step counts; their mean is scaled by the mean step count."""

    def work(self) -> None:
        mean: dict[str, State] = {
            g: {n: torch.zeros_like(t) for n, t in shared.items()}
            for g, shared in self.shared.items()
        }
        lengths = dict.fromkeys(self.shared, 0.0)
        for i, client_info in enumerate(self.cards):
            module, group = self.received(i), client_info.arch.spec_id
            before, trained = copied(floats(module)), dict(module.named_parameters())
            self.local(i, module)
            steps, rho = -(-client_info.num_rows // BATCH), client_info.settings.optimizer.momentum
            length = (steps - rho * (1 - rho**steps) / (1 - rho)) / (1 - rho)
            share = client_info.num_rows / self.total[group]
            lengths[group] += share * length
            with torch.no_grad():
                for name, tensor in floats(module).items():
                    mean[group][name].add_(
                        tensor - before[name], alpha=share / (length if name in trained else 1.0)
                    )
        with torch.no_grad():
            for group, shared in self.shared.items():
                parameters = dict(self.modules[group].named_parameters())
                for name, tensor in shared.items():
                    tensor.add_(
                        mean[group][name], alpha=lengths[group] if name in parameters else 1.0
                    )
