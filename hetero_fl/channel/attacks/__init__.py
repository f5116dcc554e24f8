"""Simulated liars, for studies: a short file for each family of attacks."""

from hetero_fl.channel.attacks import logits, rows, updates
from hetero_fl.channel.attacks.base import Attack, Scene, attack
from hetero_fl.channel.attacks.liars import Liars

__all__ = ["Attack", "Liars", "Scene", "attack"]
del logits, rows, updates
