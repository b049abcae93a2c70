"""Networks as lists of DeepSpeed layer specs, ready for a ``PipelineModule``, and their weights in and out.

torchvision and transformers are imported only when a model of theirs is built.
"""

from ds_ddg.models.cifar_resnet import cifar_resnet
from ds_ddg.models.loading import load_pretrained, read_state_dict
from ds_ddg.models.losses import classification_loss, masked_lm_loss, next_token_loss
from ds_ddg.models.saving import save_pretrained
from ds_ddg.models.torchvision_resnet import torchvision_resnet
from ds_ddg.models.transformers.specs import causal_lm, from_transformers, masked_lm, sequence_classification
from ds_ddg.models.weight_files import WeightsError

__all__ = [
    "WeightsError",
    "causal_lm",
    "cifar_resnet",
    "classification_loss",
    "from_transformers",
    "load_pretrained",
    "masked_lm",
    "masked_lm_loss",
    "next_token_loss",
    "read_state_dict",
    "save_pretrained",
    "sequence_classification",
    "torchvision_resnet",
]
