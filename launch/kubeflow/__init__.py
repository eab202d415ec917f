"""A recipe for Kubeflow Trainer."""

from launch.kubeflow.train import train_job

__all__ = ["train_job"]
