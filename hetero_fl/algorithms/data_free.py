"""What data-free methods have in common: a generator trained on models alone, and a student trained on what it makes."""

from __future__ import annotations

import math

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from hetero_fl.algorithms.base import STUDENT, Algorithm
from hetero_fl.architecture import Architecture
from hetero_fl.config.optimizer import OptimizerConfig
from hetero_fl.objectives import Digest
from hetero_fl.plan import Fit, Table
from hetero_fl.seeding import generator
from hetero_fl.state import Columns, Participant
from hetero_fl.synthesis import Generator, Synthesis

GENERATOR = "generator"


class DataFree(Algorithm):
    """Settings and steps of a server that alternates between a generator of examples and a student."""

    synthesis_epochs: PositiveInt = Field(15, description="alternations of generator and student; the authors: 200")
    generator_steps: PositiveInt = Field(
        30, description="steps of the generator on one batch of noise and labels, as the authors have it"
    )
    student_steps: PositiveInt = Field(50, description="steps of the student on all batches so far, after each")
    synthetic_batch: int = Field(64, ge=2, description="generated examples of a batch")
    noise: PositiveInt = Field(64, description="width of the generator's input")
    generator_lr: PositiveFloat = Field(1e-3, description="its learning rate (Adam)")
    statistics_weight: NonNegativeFloat = Field(1.0, description="λ₁: weight of the BatchNorm statistics")
    adversarial_weight: NonNegativeFloat = Field(0.5, description="λ₂: weight of the difference to the student")
    temperature: PositiveFloat = Field(4.0, description="T of the student's softened softmax")

    def generator(self, shape: tuple[int, ...]) -> Architecture:
        """From noise to examples of this shape."""
        name, options = f"python:{Generator.__module__}:{Generator.__name__}", {"shape": shape}
        return Architecture.of(name, math.prod(shape), (self.noise,), options=options)

    def drawn(self, server: Participant) -> Columns:
        """A batch of noise and labels."""
        draws = generator(*server.stream("noise"))
        x = torch.randn(self.synthetic_batch, self.noise, generator=draws)
        return {"x": x, "y": torch.randint(server.task.outputs, (self.synthetic_batch,), generator=draws)}

    def imagine(self, synthesis: Synthesis, noise: Columns, frozen: tuple[str, ...]) -> Fit:
        """The generator's steps on one batch of noise."""
        return Fit(
            {GENERATOR: None},
            synthesis,
            Table(noise),
            steps=self.generator_steps,
            batch_size=self.synthetic_batch,
            optimizer=OptimizerConfig(lr=self.generator_lr),
            frozen=frozen,
            keep=GENERATOR,
            label=GENERATOR,
        )

    def distil(self, server: Participant, x: Tensor, teacher: Tensor) -> Fit:
        """The student's steps on all examples so far."""
        return Fit(
            {STUDENT: None},
            Digest(server.task.kind, self.temperature, slot=STUDENT),
            Table({"x": x, "teacher": teacher}),
            steps=self.student_steps,
            batch_size=self.synthetic_batch,
            optimizer=server.optimizer,
            keep=STUDENT,
            label=STUDENT,
        )
