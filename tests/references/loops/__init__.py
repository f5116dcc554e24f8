"""Plain loops: methods for one machine with lists of models, optimizers and tensors.

They take the same gradient steps and forward passes as the framework, in the same batches, with
fused optimizers and the same memory layout. Tests compare losses, steps and operations. They omit
encoding, transfer, validation and isolation.
"""
