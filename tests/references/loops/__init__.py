"""Bare loops: methods as one would write them by hand for one machine, with lists of models, optimizers and tensors.

They take the same gradient steps and forward passes on the batches that the framework draws, with the fused optimizers and the
memory layout that it uses; that is checked on losses, steps and operations. What they leave out is what a federation adds:
nothing is encoded, sent, validated or kept apart.
"""
