"""Example callbacks that send the metrics of a run to MLflow and Weights & Biases."""
