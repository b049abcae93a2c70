"""Networks as lists of DeepSpeed layer specs, ready for a ``PipelineModule``."""

from ds_ddg.models.resnet import cifar_resnet

__all__ = ["cifar_resnet"]
