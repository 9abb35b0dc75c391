from sb3_ext.offline.dataset import TransitionDataset, load_dataset
from sb3_ext.offline.errors import DatasetError

__all__ = ["DatasetError", "TransitionDataset", "load_dataset"]
